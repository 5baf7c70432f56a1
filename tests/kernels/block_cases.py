"""Cases of block_attention that every backend answers, and the op's equations written out in float64."""

from dataclasses import dataclass, field

import torch

from dit_accel.testing import far_from_zero
from dit_accel_kernels.block_attention import BlockPlan, Kind, plan_blocks, starts_of

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Shapes, head kinds and options of one call."""

    tokens: tuple[int, int] = (300, 300)
    width: int = 64
    kinds: tuple[Kind, ...] = (Kind.ATTEND, Kind.ATTEND)
    batch: int = 1
    kv_batch: int | None = None
    block: int = 128
    density: float = 0.5
    starts: tuple[list[int], list[int]] | None = None  # ragged blocks anywhere
    bias: bool = False
    padded: bool = False  # the bias hides keys 150 and on, and every key of the last sample
    valid: tuple[int, ...] | None = None
    strided: bool = False
    options: dict = field(default_factory=dict)

    def starts_tensors(self):
        if self.starts:
            return tuple(torch.tensor(s, dtype=torch.int32) for s in self.starts)
        return tuple(starts_of(n, self.block) for n in self.tokens)


ALL_KINDS = tuple(Kind)
CASES = {
    "one_token": Case((1, 1), 32, (Kind.ATTEND,)),
    "odd": Case((301, 301), 64, batch=2),
    "cross_short_keys": Case((200, 77), 72, batch=2, kv_batch=1),
    "cross_long_keys": Case((65, 500), 96),
    "empty_lists": Case((260, 260), 64, density=0.0),
    "dense": Case((257, 257), 128, density=1.0),
    "small_blocks": Case((150, 150), 32, block=64),
    "ragged_inside": Case(
        (333, 333), 64, starts=([0, 128, 200, 328, 333], [0, 128, 200, 328, 333]), valid=(330, 205), batch=2
    ),
    "bias": Case((130, 200), 64, ALL_KINDS, bias=True),
    "bias_padding": Case((130, 200), 64, ALL_KINDS, batch=3, bias=True, padded=True),
    "padding_of_all_heads": Case((130, 200), 64, (Kind.ATTEND,) * 2, batch=2, padded=True),
    "without_lse": Case(
        (391, 391), 64, (Kind.ATTEND, Kind.COPY, Kind.SKIP, Kind.ADD) * 2, batch=2, valid=(391, 100)
    ),
    "all_kinds": Case((391, 391), 64, ALL_KINDS * 2, batch=2),
    "all_kinds_strided": Case((260, 391), 128, ALL_KINDS, batch=2, strided=True),
    "all_kinds_lengths": Case((391, 391), 96, ALL_KINDS, batch=2, valid=(391, 100)),
}


@dataclass
class Call:
    """The tensors of a case. `cached` is read by some heads and written by others."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: BlockPlan
    near: torch.Tensor  # bool [H, Nq, Nk]
    rest: torch.Tensor
    options: dict

    def copy(self) -> "Call":
        """The same call on buffers of its own."""
        options = {n: t.clone() if torch.is_tensor(t) else t for n, t in self.options.items()}
        return Call(self.q, self.k, self.v, self.plan, self.near, self.rest, options)


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Call:
    """Random data far from zero; what an op must not read, or must overwrite, is NaN."""
    generator = torch.Generator().manual_seed(seed)
    (nq, nk), heads = case.tokens, len(case.kinds)
    q_starts, k_starts = case.starts_tensors()
    shape = (heads, len(q_starts) - 1, len(k_starts) - 1)
    near = torch.rand(shape, generator=generator) < case.density
    if 0 < case.density < 1 and shape[1] > 1:
        near[0, 1] = False  # a row that sees nothing
    plan = plan_blocks(near, q_starts, k_starts, case.kinds, block=case.block)
    q = _tensor((case.batch, nq, heads, case.width), dtype, seed + 1, case.strided)
    kv = (case.kv_batch or case.batch, nk, heads, case.width)
    k, v = (_tensor(kv, dtype, seed + i, case.strided) for i in (2, 3))
    options = _options(case, plan, dtype, generator, seed)
    tokens = lambda lists: lists.repeat_interleave(q_starts.diff(), 1).repeat_interleave(k_starts.diff(), 2)  # noqa: E731
    if case.valid:
        for sample, valid in enumerate(case.valid):
            k[sample, valid:] = v[sample, valid:] = NAN
    if case.padded:
        k[:, 150:] = v[:, 150:] = k[-1] = v[-1] = NAN
    return Call(q, k, v, plan, tokens(near), tokens(~near), options)


def _tensor(shape, dtype, seed, strided):
    if not strided:
        return far_from_zero(*shape, dtype=dtype, seed=seed)
    # [B, N, H, D] as it lies in a packed projection, heads before tokens
    b, n, h, d = shape
    packed = far_from_zero(b, h, n, 2 * d + 8, dtype=dtype, seed=seed)
    return packed.transpose(1, 2)[..., 8 : 8 + d]


def _options(case, plan, dtype, generator, seed):
    (nq, nk), B, D = case.tokens, case.batch, case.width
    options = dict(case.options)
    if plan.num_cached:
        cached = far_from_zero(B, nq, plan.num_cached, D, dtype=dtype, seed=seed + 4)
        cached_lse = torch.randn(B, nq, plan.num_cached, generator=generator) * 2
        cached_lse[:, ::5] = float("-inf")
        for kind, slot in zip(plan.kinds, plan.slot.tolist(), strict=True):
            if kind in (Kind.EMIT_RESIDUAL, Kind.EMIT_TAIL):
                cached[:, :, slot] = NAN
            if kind is not Kind.MERGE and slot >= 0:
                cached_lse[:, :, slot] = NAN
        options |= {"cached": cached, "cached_lse": cached_lse}
    if Kind.SKIP in plan.kinds:
        out = torch.full((B, nq, plan.num_heads, D), NAN, dtype=dtype)
        for head, kind in enumerate(plan.kinds):
            if kind is Kind.SKIP:
                out[:, :, head] = 7.0
        options["out"] = out
    if case.bias:
        options["key_bias"] = torch.rand(1, plan.num_heads, nk, generator=generator).mul(5).log()
    if case.padded:
        heads = plan.num_heads if case.bias else 1
        padding = torch.zeros(B, heads, nk)
        padding[:, :, 150:] = padding[-1] = float("-inf")
        options["key_bias"] = options.get("key_bias", 0) + padding
    if case.valid:
        options["valid_keys"] = torch.tensor(case.valid, dtype=torch.int32)
    return options


def by_definition(call: Call) -> dict[str, torch.Tensor]:
    """`out`, `lse`, `cached`, `cached_lse` of the op's equations, every token written out, in float64."""
    near_out, near_lse = _softmax(call, call.near)
    all_out, all_lse = _softmax(call, call.near | call.rest)
    rest_out, rest_lse = _softmax(call, call.rest)
    out, lse = near_out.clone(), near_lse.clone()
    cached = call.options.get("cached")
    kept = None if cached is None else cached.double().clone()
    kept_lse = None if cached is None else call.options["cached_lse"].double().clone()
    for head, (kind, slot) in enumerate(zip(call.plan.kinds, call.plan.slot.tolist(), strict=True)):
        if kind in (Kind.COPY, Kind.SKIP):
            source = kept[:, :, slot] if kind is Kind.COPY else call.options["out"][:, :, head].double()
            out[:, :, head], lse[:, :, head] = source, float("-inf")
        if kind is Kind.ADD:
            out[:, :, head] += kept[:, :, slot]
        if kind is Kind.MERGE:
            both = torch.stack([near_lse[:, :, head], kept_lse[:, :, slot]])  # [2, B, Nq]
            lse[:, :, head] = both.logsumexp(0)
            weights = torch.where(lse[:, :, head].isfinite(), (both - lse[:, :, head]).exp(), 0.0)[..., None]
            out[:, :, head] = weights[0] * near_out[:, :, head] + weights[1] * kept[:, :, slot]
        if kind in (Kind.EMIT_RESIDUAL, Kind.EMIT_TAIL):
            out[:, :, head], lse[:, :, head] = all_out[:, :, head], all_lse[:, :, head]
            kept[:, :, slot] = rest_out[:, :, head]
            if kind is Kind.EMIT_RESIDUAL:
                kept[:, :, slot] = all_out[:, :, head] - near_out[:, :, head]
            else:
                kept_lse[:, :, slot] = rest_lse[:, :, head]
    return {"out": out, "lse": lse, "cached": kept, "cached_lse": kept_lse}


def _softmax(call, keep):
    batch = call.q.shape[0]
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if "key_bias" in call.options:
        scores = scores + call.options["key_bias"].double()[:, :, None]
    seen = keep[None].expand(batch, -1, -1, -1).clone()
    for sample, valid in enumerate(call.options.get("valid_keys", [])):
        seen[sample, :, :, valid:] = False
    if "key_bias" in call.options:
        seen &= call.options["key_bias"][:, :, None] > float("-inf")
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)  # [B, H, Nq]
    weights = torch.where(lse[..., None].isfinite(), (scores - lse[..., None]).exp(), 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v.nan_to_num(0.0))
    return out, lse.transpose(1, 2)


def by_torch(call: Call) -> dict[str, torch.Tensor]:
    """The same in plain PyTorch on tensors in the dtype of q: its error is the budget."""
    from dit_accel_kernels.block_attention import reference

    plain = call.copy()
    options = {"cached": None, "cached_lse": None, "key_bias": None, "valid_keys": None} | plain.options
    out = options.pop("out", torch.empty_like(call.q))
    lse = torch.full(call.q.shape[:3], float("-inf"))
    scale = call.q.shape[-1] ** -0.5
    reference.block_attention(out, lse, call.q, call.k, call.v, call.plan, scale, **options)
    return {"out": out, "lse": lse, "cached": options["cached"], "cached_lse": options["cached_lse"]}
