"""Gradient checkpointing: blocks keep no activations, the backward computes them again.

Source: Chen et al. 2016, arXiv:1604.06174; the libraries' own, which give bit-equal gradients.
"""

from collections.abc import Callable

from torch import nn

from dit_accel.errors import BadUsage

ON_OFF = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),  # diffusers
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),  # transformers
)


def recompute_blocks(module: nn.Module) -> Callable[[], None]:
    """Switches it on in every model of diffusers or transformers within `module` that has it.

    Returns what switches it off again. Raises BadUsage where there is none.
    """
    switches: list[Callable[[], None]] = []
    for part in module.modules():
        for on, off in ON_OFF:
            if callable(getattr(part, on, None)):
                try:
                    getattr(part, on)()
                except ValueError:  # this one has none; another may
                    continue
                switches.append(getattr(part, off))
    if not switches:
        raise BadUsage(
            f"asked to compute activations of {type(module).__name__} again in the backward; no model of "
            "diffusers or transformers in it can. Leave `recompute` out."
        )

    def switch_off() -> None:
        for off in switches:
            off()

    return switch_off
