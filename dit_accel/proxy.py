"""The stand-in for a model's attention processor: its own code, with its attention call led to ours.

`twin(cls)` is a processor class whose `__call__` is the original code object running in a copy of its
module's namespace, in which `dispatch_attention_fn` and `F.scaled_dot_product_attention` are ours. So norm,
RoPE, LoRA, fused projections and IP-adapters stay the model's own, and nothing global is patched.

One proxy serves all layers of a processor class: the layer is named by a small CPU tensor on the attention
module, because a Python object per layer would make Dynamo compile every layer anew. While compiling, the
entry points call one opaque custom op; in eager mode they call plain Python, which is 50-100 us cheaper.
"""

import copy
import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import compat
from dit_accel.session import Session
from dit_accel.visit import attend

KEY_ATTRIBUTE = "_dit_accel_key"
SDPA, DISPATCH = 0, 1

SESSIONS: "weakref.WeakValueDictionary[int, Installed]" = weakref.WeakValueDictionary()


class Installed:
    """What an attention call must find from its key: the session and the sites by number."""

    def __init__(self, session: Session):
        self.session = session
        self.sites: list[tuple[str, str]] = []  # (component, site)
        self.number = max(SESSIONS, default=0) + 1
        SESSIONS[self.number] = self

    def key_of(self, component: str, site: str) -> Tensor:
        """A CPU tensor naming one site of this session."""
        if (component, site) not in self.sites:
            self.sites.append((component, site))
        return torch.tensor([self.number, self.sites.index((component, site))])


class _Traced:
    """The key while Dynamo traces: a plain attribute, which it can follow."""

    key: Tensor | None = None


_traced = _Traced()
_eager = threading.local()


def _set_key(key: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        _traced.key = key
    else:
        _eager.key = key


def _current_key() -> Tensor | None:
    return _traced.key if torch.compiler.is_compiling() else getattr(_eager, "key", None)


# ---- the attention call


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor, scale: float | None, kind: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """Lead one attention call ([B, N, H, D]) to its session; the dense call is rebuilt from `kind`."""
    dense = functools.partial(_dense, scale=scale, kind=kind, backend=backend)
    out = _lead(q, k, v, mask, key, scale, dense)
    return out.contiguous() if out.data_ptr() != q.data_ptr() else out.clone()


_op = torch.library.custom_op("dit_accel::attend", _attend, mutates_args=())


@_op.register_fake
def _(q, k, v, mask, key, scale, kind, backend):  # pyright: ignore
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, kind: int, backend: str
) -> Tensor:
    if kind == DISPATCH:
        return compat.dispatch_attention(q, k, v, attn_mask=mask, scale=scale, backend=backend or None)
    return _sdpa(q, k, v, mask, scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **arguments: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **arguments).transpose(1, 2)


def _lead(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor, scale: float | None,
    dense: Callable[..., Tensor], rank: int = 0,
) -> Tensor:  # fmt: skip
    installed = SESSIONS.get(int(key[0]))
    if installed is None:
        return dense(q, k, v, mask)
    site = installed.sites[int(key[1])]
    return attend(installed.session, site, q, k, v, mask, scale, dense, first_head=rank * q.shape[2])


def _entry_dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None, *, backend: Any = None, parallel_config: Any = None,
) -> Tensor:  # fmt: skip
    """Stands where a processor calls `dispatch_attention_fn`; q, k, v are [B, N, H, D]."""
    site = _current_key()
    rest = {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
    rest |= {"attention_kwargs": attention_kwargs, "backend": backend}

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: Any = None) -> Tensor:
        return compat.dispatch_attention(q, k, v, attn_mask=mask, scale=scale, parallel_config=config, **rest)

    special = dropout_p or is_causal or enable_gqa or attention_kwargs
    if site is None or special:
        return dense(query, key, value, attn_mask, parallel_config)
    if parallel_config is not None:
        return _sharded(query, key, value, attn_mask, site, scale, parallel_config, dense)
    if torch.compiler.is_compiling():
        name = "" if backend is None else str(getattr(backend, "value", backend))
        return _op(query, key, value, attn_mask, site, scale, DISPATCH, name)
    return _lead(query, key, value, attn_mask, site, scale, dense)


def _sharded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor, scale: float | None, config: Any,
    dense: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Under Ulysses our core sees the whole sequence and this rank's heads; a ring stays dense."""
    rank = compat.ulysses_rank(config)
    installed = SESSIONS.get(int(site[0]))
    at = installed.session.at if installed else None
    if rank is None or installed is None or at is None:
        return dense(q, k, v, mask, config)
    if at.joint and installed.session.active:
        # every rank joins its own text and visual tokens: together they are [text0, visual0, text1, visual1]
        key = installed.sites[int(site[1])]
        if (
            installed.session.track("attention", key) is not None
            and not installed.session.recipe.is_neutral()
        ):
            installed.session.fallback(
                "ran dense: ranks interleave text and visual tokens under Ulysses", key[1]
            )
        return dense(q, k, v, mask, config)

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _lead(q, k, v, mask, site, scale, dense, rank)

    return compat.attention_over_shards(q, k, v, mask, scale, config, core)


def _entry_sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Stands where a processor calls `F.scaled_dot_product_attention`; q, k, v are [B, H, N, D]."""
    site = _current_key()
    rest = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if site is None or dropout_p or is_causal or enable_gqa:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **rest)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.compiler.is_compiling():
        return _op(q, k, v, attn_mask, site, scale, SDPA, "").transpose(1, 2)
    return _lead(q, k, v, attn_mask, site, scale, functools.partial(_sdpa, **rest)).transpose(1, 2)


# ---- twins and proxies


@functools.cache
def twin(cls: type) -> type:
    """A subclass of processor class `cls` whose attention call is ours."""
    call = inspect.unwrap(cls.__call__)
    name = f"dit_accel._twins.{cls.__module__}.{cls.__qualname__}"
    namespace = _copy_of_namespace(name, call.__globals__)
    if "dispatch_attention_fn" in namespace:
        namespace["dispatch_attention_fn"] = _entry_dispatch
    if namespace.get("F") is F:
        functional = _copy_of_namespace(f"{name}.F", F.__dict__)
        functional["scaled_dot_product_attention"] = _entry_sdpa
        namespace["F"] = sys.modules[f"{name}.F"]
    rebound = types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__
    return type(cls.__name__, (cls,), {"__call__": rebound, "__module__": name})


def _copy_of_namespace(name: str, source: dict[str, Any]) -> dict[str, Any]:
    """A registered module with the same names: Dynamo looks globals up in sys.modules, and relative imports
    inside a function need `__package__`."""
    module = types.ModuleType(name)
    skip = ("__name__", "__spec__", "__loader__", "__file__", "__cached__", "__doc__")
    module.__dict__.update({key: value for key, value in source.items() if key not in skip})
    sys.modules[name] = module
    return module.__dict__


class Proxy:
    """Takes the place of a processor on all attention modules that had an equal one."""

    def __init__(self, original: Any):
        inner = copy.copy(original)
        inner.__class__ = twin(type(original))
        self.inner = inner
        self.originals = [original]

    def __getattr__(self, name: str) -> Any:
        # so that `hasattr(processor, "_attention_backend")` answers as for the original
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("inner", "originals"):
            object.__setattr__(self, name, value)
            return
        # a backend or a parallel config set by the user must survive our undo
        for processor in (self.inner, *self.originals):
            setattr(processor, name, value)


def make_proxy(original: Any, gate: Callable[..., Any] | None = None) -> Proxy:
    """A proxy for processors like `original`. `gate(attn, run, args, kwargs)`, if given, decides whether the
    module runs at all; it is hidden from Dynamo, which costs a graph break at those sites.

    Attention.forward filters keyword arguments by the signature of `processor.__call__`, so ours shows the
    original's.
    """

    @functools.wraps(inspect.unwrap(type(original).__call__))
    def run(self: Proxy, attn: Any, *args: Any, **kwargs: Any) -> Any:
        _set_key(getattr(attn, KEY_ATTRIBUTE))
        try:
            return self.inner(attn, *args, **kwargs)
        finally:
            _set_key(None)

    @functools.wraps(inspect.unwrap(type(original).__call__))
    @torch.compiler.disable
    def gated(self: Proxy, attn: Any, *args: Any, **kwargs: Any) -> Any:
        assert gate is not None
        return gate(attn, functools.partial(run, self, attn), args, kwargs)

    call = run if gate is None else gated
    return type(type(original).__name__, (Proxy,), {"__call__": call})(original)
