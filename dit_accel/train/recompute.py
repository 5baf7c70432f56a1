"""Gradient checkpointing: blocks keep no activations, the backward computes them again.

Source: Chen et al. 2016, arXiv:1604.06174; the libraries' own, which give bit-equal gradients.
"""

from torch import nn

from dit_accel.errors import BadUsage

SWITCHES = ("enable_gradient_checkpointing", "gradient_checkpointing_enable")  # diffusers, transformers


def recompute_blocks(module: nn.Module) -> None:
    """Switches it on in every model of diffusers or transformers within `module` that has it.

    Raises BadUsage where there is none.
    """
    switched = 0
    for part in module.modules():
        for name in SWITCHES:
            if callable(getattr(part, name, None)):
                try:
                    getattr(part, name)()
                except ValueError:  # this one has none; another may
                    continue
                switched += 1
    if not switched:
        raise BadUsage(
            f"asked to compute activations of {type(module).__name__} again in the backward; no model of "
            "diffusers or transformers in it can. Leave `recompute` out."
        )
