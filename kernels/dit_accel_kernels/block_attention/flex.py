"""block_attention by PyTorch's compiled flex_attention, on a CPU.

Inductor writes C++ and needs a C++ compiler of its own ($CXX, else g++; seen with torch 2.13), so this serves
where our C source cannot be built and that compiler works, and nowhere else: without any compiler it is
`gathered` that runs. On a CPU compiled flex_attention returns no LSE, so it takes only calls whose LSE nobody
asks for, of heads that attend, add, copy or are left alone.

One shape is compiled once, in seconds, and then only called. Blocks must be of one size for flex_attention:
ragged ones are filled up, with keys that a bias hides.
"""

import functools
import os
import shutil
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.parts import bias_of
from dit_accel_kernels.block_attention.plan import CACHED_LSE, EMITS, WITHOUT_LIST, BlockPlan, Kind
from dit_accel_kernels.dispatch import BackendUnavailable

WORTH_COMPILING = 512  # tokens: below, SDPA over gathered blocks takes some ms
SIZES = (32, 64, 128)  # of blocks as Inductor's CPU template tiles them
_failed: list[str] = []  # what a compilation said: it is not tried again at every call
_known: "weakref.WeakKeyDictionary[BlockPlan, _Lists]" = weakref.WeakKeyDictionary()


def why_not(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, lse_wanted: bool = True, **others: Any
) -> str | None:
    """The reason why this backend cannot take these tensors, or None. Nothing is compiled."""
    for name, tensor in {"q": q, "k": k, "v": v, "the plan": plan.indices}.items():
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device.type}: this backend is for a CPU"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"q is {str(q.dtype)[6:]}: only float32, float16 or bfloat16, one for all"
    if lse_wanted:
        return "compiled flex_attention returns no LSE on a CPU, and the call asks for it"
    bad = [kind.name for kind in sorted(set(plan.kinds) & (CACHED_LSE | EMITS))]
    if bad:
        return f"compiled flex_attention returns no LSE on a CPU, and heads of kind {bad[0]} need it"
    return _failed[0] if _failed else _no_compiler()


def why_not_auto(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, lse_wanted: bool = True, **others: Any
) -> str | None:
    """As `why_not`, and not for so little work that compiling would take longer than all calls."""
    if min(plan.tokens) < WORTH_COMPILING:
        return f"fewer than {WORTH_COMPILING} tokens are not worth the seconds of compiling"
    return why_not(q, k, v, plan, lse_wanted)


@functools.cache
def _no_compiler() -> str | None:
    """Why Inductor has no C++ compiler, or None: it takes $CXX, else g++ (clang++ on a Mac)."""
    asked = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(asked.split()[0]):
        return f'Inductor needs a C++ compiler, and "{asked}" ($CXX, else g++) is not installed'
    return None


@dataclass(frozen=True)
class _Lists:
    """A plan as flex_attention takes it: blocks of one size, and where their tokens are."""

    mask: Any  # BlockMask
    q_place: Tensor | None  # [Nq filled]: the token at each place; None where nothing had to be filled
    q_back: Tensor | None  # [Nq]: the place of each token
    k_place: Tensor | None  # [Nk filled]
    k_filling: Tensor | None  # bool [Nk filled]: keys that stand for nothing


def block_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    cached: Tensor | None,
    cached_lse: Tensor | None,
    key_bias: Tensor | None,
    valid_keys: Tensor | None,
) -> None:
    """Fills `out`, but not `lse`. Raises BackendUnavailable where nothing can be compiled."""
    lists = _known.get(plan) or _known.setdefault(plan, _lists(plan))
    bias = None
    if key_bias is not None or valid_keys is not None or lists.k_filling is not None:
        bias = bias_of(q, k, key_bias, valid_keys).float()  # [B, H or 1, Nk]
        # an unseen key may hold anything, and 0 * NaN is NaN
        v = v.expand(q.shape[0], -1, -1, -1).masked_fill((bias == -torch.inf).all(1)[..., None, None], 0.0)
        if lists.k_place is not None and lists.k_filling is not None:
            bias = bias[:, :, lists.k_place].masked_fill(lists.k_filling, -torch.inf)
        bias = bias.expand(-1, q.shape[2], -1).contiguous()
    # float32 is no slower than 16 bits here, and its weights are not rounded before they meet the values
    filled = (_filled(x, place) for x, place in ((q, lists.q_place), (k, lists.k_place), (v, lists.k_place)))
    query, key, value = (x.float().transpose(1, 2).contiguous() for x in filled)
    result = _run(query, key.expand(q.shape[0], -1, -1, -1), value, bias, lists.mask, scale)
    result = result.transpose(1, 2)  # [B, Nq filled, H, D]
    if lists.q_back is not None:
        result = result.index_select(1, lists.q_back)
    _finish(out, result, plan, cached)


def _filled(tensor: Tensor, place: Tensor | None) -> Tensor:
    return tensor if place is None else tensor.index_select(1, place)


def _finish(out: Tensor, result: Tensor, plan: BlockPlan, cached: Tensor | None) -> None:
    if all(kind is Kind.ATTEND for kind in plan.kinds):
        out.copy_(result)
        return
    for head, (kind, slot) in enumerate(zip(plan.kinds, plan.slot.tolist(), strict=True)):
        kept = None if cached is None else cached[:, :, slot]
        if kind is Kind.ATTEND:
            out[:, :, head] = result[:, :, head].to(out.dtype)
        elif kind is not Kind.SKIP:
            assert kept is not None  # checked by the op
            added = result[:, :, head] if kind is Kind.ADD else 0
            out[:, :, head] = (kept.float() + added).to(out.dtype)


def _run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Any, scale: float) -> Tensor:
    v = v.expand_as(k)
    call = _compiled((q.shape, k.shape, bias is None, mask.BLOCK_SIZE, scale))
    try:
        with torch.inference_mode(False), torch.no_grad():
            return call(q, k, v, bias, mask, scale)
    except Exception as error:  # Inductor has no error that all of its failures share
        _failed[:] = [f"flex_attention could not be compiled: {str(error).strip().splitlines()[0]}"]
        raise BackendUnavailable(f"block_attention: {_failed[0]}") from error


@functools.lru_cache(maxsize=64)
def _compiled(shapes: Any) -> Callable[..., Tensor]:
    """A compiled function for one key: a code object of its own, since Dynamo keeps 8 versions of each."""
    code = _attend.__code__.replace(co_name=f"flex_attend_{hash(shapes) & 0xFFFFFFFF:08x}")
    return torch.compile(types.FunctionType(code, globals()), dynamic=False, fullgraph=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Any, scale: float) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if bias is None:
        return flex_attention(q, k, v, block_mask=mask, scale=scale)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        added = bias[b, h, j]
        return torch.where(added == -torch.inf, -torch.inf, score + added)

    return flex_attention(q, k, v, score_mod=add_bias, block_mask=mask, scale=scale)


def _lists(plan: BlockPlan) -> _Lists:
    from torch.nn.attention.flex_attention import BlockMask

    size = next(size for size in SIZES if plan.block <= size)
    rows, columns = len(plan.q_starts) - 1, len(plan.k_starts) - 1
    pattern = plan.pattern.long()
    attends = torch.tensor([kind not in WITHOUT_LIST for kind in plan.kinds])[:, None]
    near = (plan.split - plan.pointers[:-1]).view(-1, rows)[pattern]  # [H, NQ]
    first = plan.pointers[:-1].view(-1, rows)[pattern].long()
    places = (first[..., None] + torch.arange(columns)).clamp(max=max(0, len(plan.indices) - 1))
    indices = plan.indices[places] if len(plan.indices) else torch.zeros_like(places)
    count = torch.where(attends, near, 0).int()[None]  # [1, H, NQ]
    q_place, q_back, _ = _filling(plan.q_starts, size)
    k_place, _, k_filling = _filling(plan.k_starts, size)
    lengths = (
        plan.tokens[0] if q_place is None else len(q_place),
        plan.tokens[1] if k_place is None else len(k_place),
    )
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(indices, dtype=torch.int32)[None],
        count, indices.int()[None].contiguous(), BLOCK_SIZE=size, seq_lengths=lengths,
    )  # fmt: skip
    return _Lists(mask, q_place, q_back, k_place, k_filling)


def _filling(starts: Tensor, size: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where blocks are not all of `size` but the last: tokens by place, places by token, what is filling."""
    starts = starts.long()
    sizes = starts.diff()
    if (sizes[:-1] == size).all():
        return None, None, None
    within = torch.arange(size)
    filling = within >= sizes[:, None]  # [NB, size]
    place = starts[:-1, None] + torch.minimum(within, sizes[:, None] - 1)
    return place.flatten(), (~filling).flatten().nonzero()[:, 0], filling.flatten()
