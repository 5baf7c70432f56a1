"""What makes training affordable on a CPU and changes nothing that the pipeline computes."""

import math
from collections.abc import Sequence

import torch
from torch import nn

WAN_TEXT_LENGTH = 512  # WanPipeline pads to it with zeros and masks nothing


class PaddingKey:
    """Makes cross-attention treat its last key as many equal keys: an additive mask of log(count)."""

    def __init__(self, transformer: nn.Module):
        self.mask: torch.Tensor | None = None
        for block in transformer.blocks:
            block.attn2.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple) -> tuple:
        hidden, text, *_ = args
        return hidden, text, None if self.mask is None else self.mask.to(text.dtype), None

    def set(self, lengths: torch.Tensor, width: int) -> None:
        """`lengths` `[B]`: real words of each prompt among `width` keys; the zero key comes after them."""
        place = torch.arange(width, device=lengths.device)
        words = torch.zeros(len(lengths), width, device=lengths.device)
        words = words.masked_fill(place[None] >= lengths[:, None], -math.inf)
        padding = torch.log((WAN_TEXT_LENGTH - lengths).float())[:, None]
        self.mask = torch.cat([words, padding], dim=1)[:, None, None]  # [B, 1, 1, width + 1]


class FrameWindow:
    """Gives the rotary table the true places of a sample that is part of a clip, or a smaller picture of it.

    `frames` are the latent frame numbers present; `stride` is the distance of neighbours in Y and X: 2 for a
    scene drawn at half the size, so that its things are as far apart as at full size.
    """

    def __init__(self, transformer: nn.Module):
        self.frames: Sequence[int] | None = None
        self.stride = 1
        self.rope = transformer.rope
        self.rope.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if self.frames is None and self.stride == 1:
            return None
        frames = list(range(args[0].shape[2]) if self.frames is None else self.frames)
        height, width = (size * self.stride for size in args[0].shape[-2:])
        whole = type(module).forward(module, args[0].new_empty(1, 1, max(frames) + 1, height, width))
        grids = (table.unflatten(1, (-1, height, width))[:, frames] for table in whole)  # [1, F, Y, X, 1, D]
        return tuple(grid[:, :, :: self.stride, :: self.stride].flatten(1, 3) for grid in grids)


class SpreadPlaces:
    """Gives a picture of half the size the rotary places of every `stride`-th token of the whole size."""

    def __init__(self, transformer: nn.Module):
        self.stride = 1
        transformer.pos_embed.register_forward_pre_hook(self._spread, with_kwargs=True)
        transformer.pos_embed.register_forward_hook(self._thin)

    def _spread(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        shapes, *rest = args
        wide = [[(frames, y * self.stride, x * self.stride) for frames, y, x in each] for each in shapes]
        return (wide, *rest), kwargs

    def _thin(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        visual, text = output  # [N, D], [L, D]
        frames, height, width = args[0][0][0]
        grid = visual.unflatten(0, (frames, height, width))[:, :: self.stride, :: self.stride]
        return grid.flatten(0, 2), text
