"""Choose the backend of an op: the fastest one that can run, or the one that was asked for.

A backend is a module `<op>/<backend>.py` with a function of the op's name and a `why_not(**tensors)` that
returns None, or the reason why it cannot take these tensors: the log line, the report and the error. A
backend that may be asked for before it may be chosen has a `why_not_auto(**tensors)` too, which is what
`auto` asks.
"""

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

log = logging.getLogger("dit_accel_kernels")

# the order in which "auto" tries them, and the devices that they are for; None is any
BACKENDS = {
    "cuda": "cuda",
    "triton": "cuda",
    "cpu": "cpu",
    "flex": "cpu",
    "gathered": "cpu",
    "reference": None,
}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run these tensors here."""


@functools.cache
def backends(op: str) -> tuple[str, ...]:
    """The backends that an op has, fastest first."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(f"dit_accel_kernels.{op}.{name}"))


def is_free(backend: str) -> bool:
    """Whether nobody named a backend, neither the caller nor DIT_ACCEL_BACKEND."""
    return backend == "auto" and os.environ.get("DIT_ACCEL_BACKEND", "auto") == "auto"


def why_not(op: str, backend: str, **tensors: Any) -> str | None:
    """The reason why a backend of an op cannot take these tensors on this machine, or None."""
    module = _load(op, backend)
    return module if isinstance(module, str) else module.why_not(**tensors)


def select(op: str, backend: str = "auto", **tensors: Any) -> Callable[..., Any]:
    """The function that runs an op on these tensors; `auto` is DIT_ACCEL_BACKEND if set, else the fastest."""
    return getattr(_load(op, choose(op, backend, **tensors)), op)


def choose(op: str, backend: str = "auto", **tensors: Any) -> str:
    """The name of the backend that runs an op on these tensors. Raises BackendUnavailable."""
    if is_free(backend):
        return _fastest(op, tensors)
    if backend == "auto":
        backend = os.environ["DIT_ACCEL_BACKEND"]
    if backend not in backends(op):
        raise BackendUnavailable(
            f'{op}: there is no backend "{backend}", only {", ".join(backends(op))}. '
            'Name one of these, or "auto".'
        )
    reason = why_not(op, backend, **tensors)
    if reason:
        raise BackendUnavailable(
            f'{op}: backend "{backend}" was asked for and cannot run: {reason}. '
            'Use backend="auto" to let dit_accel choose.'
        )
    return backend


def _fastest(op: str, tensors: dict[str, Any]) -> str:
    passed_over: list[tuple[str, str]] = []
    for name in backends(op):
        reason = _why_not_chosen(op, name, tensors)
        if reason is None:
            if passed_over:
                device = next((t.device.type for t in tensors.values() if hasattr(t, "device")), None)
                _say_once(op, name, device, tuple(passed_over))
            return name
        passed_over.append((name, reason))
    raise BackendUnavailable(f"{op}: no backend can take these tensors; `why_not` tells the reason of each")


def _why_not_chosen(op: str, backend: str, tensors: dict[str, Any]) -> str | None:
    module = _load(op, backend)
    if isinstance(module, str):
        return module
    return getattr(module, "why_not_auto", module.why_not)(**tensors)


@functools.cache
def _load(op: str, backend: str) -> ModuleType | str:
    """The backend's module, or what its import said."""
    try:
        return importlib.import_module(f"dit_accel_kernels.{op}.{backend}")
    except ImportError as error:
        return f"it cannot be imported: {error}"


@functools.cache
def _say_once(op: str, taken: str, device: str | None, passed_over: tuple[tuple[str, str], ...]) -> None:
    """A warning where a backend for this very device is passed over, else a log line."""
    for name, reason in passed_over:
        log.info("%s: backend %s is passed over: %s", op, name, reason)
    missed = [f"{name}: {reason}" for name, reason in passed_over if BACKENDS[name] == device is not None]
    if missed:
        warnings.warn(
            f'{op} runs on its slower backend "{taken}" here. {"; ".join(missed)}. '
            "DIT_ACCEL_BACKEND names a backend that must run.",
            stacklevel=4,
        )
