"""What stands in the way of exact tables on a denoiser, in words for the report."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat

_ADAPTER_ARGUMENTS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


def of_model(pipe: Any, component: str, module: nn.Module, compiled: bool) -> str | None:
    """Why a denoiser gets no tables in this run, or None."""
    wrapped = getattr(pipe, component, module)
    whole = isinstance(wrapped, nn.Module) and compat.unwrap_compiled(wrapped) is not wrapped
    if compiled or whole or any(compat.compiled_call(child) is not None for child in module.modules()):
        return "the denoiser is compiled, and an answer in the place of a module would break its graphs"
    if compat.hook_names(module) & compat.GROUP_OFFLOAD_HOOKS or compat.offloads(module):
        return "offloading moves the weights of each layer when the layer runs"
    if compat.is_sharded(module):
        return "the denoiser is split over processes"
    return None


def of_call(inputs: Mapping[str, Any]) -> str | None:
    """Why one forward gets no answers from tables, or None."""
    if torch.is_grad_enabled():
        return "gradients are on, and a stored row has none"
    for name in _ADAPTER_ARGUMENTS:
        if (inputs.get(name) or {}).get("scale", 1.0) != 1.0:
            return f"{name} scales adapters for the length of each forward"
    return None


def of_release(root: nn.Module, projections: Iterable[nn.Module]) -> str | None:
    """Why the projections' weights stay where they are, or None."""
    parameters = [weight for module in projections for weight in module.parameters()]
    if all(weight.device.type == "cpu" for weight in root.parameters()):
        return "the denoiser runs on the CPU, there is nothing to gain"
    if any(type(w.data) is not Tensor or not w.is_floating_point() for w in parameters):
        return "they are quantized or sharded tensors"
    if compat.is_moved_whole(root):
        return "offloading moves the denoiser as a whole"
    if compat.LAYERWISE_CASTING_HOOK in compat.hook_names(root):
        return "layerwise casting changes their dtype at every forward"
    return None
