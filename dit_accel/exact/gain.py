"""Where exact tables pay, for `auto`: by bytes and work, which are known before anything runs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dit_accel.exact import weights
from dit_accel.exact.text_kv import NORMS, TextKV
from dit_accel.session import Forward

CPU_BYTES = 16 * 2**20  # of modulation weights: under it answering costs what reading them does
TEXT_SHARE = 0.005  # of a forward's work: under it a gain is lost in the noise of the loop


def too_little_modulation(projections: Iterable[nn.Module]) -> str | None:
    """Beside an accelerator the bytes of the weights are the gain; on a CPU only the time to read them is."""
    modules = list(projections)
    if any(weight.device.type != "cpu" for module in modules for weight in module.parameters()):
        return None
    size = weights.nbytes(modules)
    if size >= CPU_BYTES:
        return None
    return f"not made: {size / 2**20:.1f} MiB of weights are read as fast as a table (auto)"


def too_little_text(stored: TextKV, module: nn.Module, at: Forward, inputs: Mapping[str, Any]) -> str | None:
    """Multiply-adds of the text's keys and values over those of the blocks' products and self-attention."""
    children = [child for _, name, child in stored.children() if name not in NORMS]
    own = sum(_products(child) for child in children)
    text = sum(inputs[name].shape[1] for name in stored.arguments if inputs.get(name) is not None)
    denoiser = stored.session.denoisers[stored.component]
    others = sum(_products(module.get_submodule(block)) for block in denoiser.blocks) - own
    width = max((child.weight.shape[0] for child in children), default=0)  # pyright: ignore
    attention = 2 * at.visual**2 * width * len(denoiser.self_attention)
    share = text * own / max(1, text * own + at.visual * others + attention)
    if share >= TEXT_SHARE:
        return None
    return f"not stored: {share:.2%} of a forward's work (auto stores from {TEXT_SHARE:.1%})"


def _products(module: nn.Module) -> int:
    return sum(math.prod(weight.shape) for weight in module.parameters() if weight.ndim == 2)
