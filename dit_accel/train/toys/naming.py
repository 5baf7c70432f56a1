"""Makes a middle block know which thing each token shows: a training loss that no pipeline computes.

The picture's loss alone is slow to teach which words belong to which place: a wrong shape at the right place
costs little of it. So a linear map of a middle block's tokens must tell colour, shape and motion of the thing
that the token shows. Aligning inner tokens with what the picture means is known to speed such models up
(REPA, arXiv:2410.06940); here the meaning need not be borrowed from another network: the caption tells it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dit_accel.scenes import parse
from dit_accel.train.toys.attributes import CHOICES, classes_of, errors_of
from dit_accel.train.toys.models import Denoiser

SHOWN = 0.25  # share of a token's pixels from which on it shows the thing: a ring's line fills no more


class Naming:
    """Keeps the tokens of `denoiser`'s middle block, and gives it the linear map `namer`."""

    def __init__(self, denoiser: Denoiser):
        transformer = denoiser.transformer
        blocks = getattr(transformer, "transformer_blocks", None) or transformer.blocks
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        denoiser.namer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(CHOICES)))
        self.tokens: Tensor | None = None
        # the side in latents of a token that packs some, as Qwen-Image's; Wan's and PixArt's is one latent
        self.patch = math.isqrt(transformer.config.in_channels // transformer.config.out_channels)
        blocks[len(blocks) // 2].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        self.tokens = output[1] if isinstance(output, tuple) else output  # two streams return (text, visual)

    def loss(self, denoiser: nn.Module, things: Tensor, captions: list[str]) -> Tensor:
        """Cross-entropies of the three attributes, summed; the mean over the tokens that show a thing.

        `things` `[B, 2, (F,) Y, X]`: each thing's share; `captions`: what the model was told, "" is not
        asked. All noise levels count alike: where there is little the picture tells the answer, where there
        is much only the caption can.
        """
        tokens, self.tokens = self.tokens, None
        if self.patch > 1:
            things = functional.avg_pool2d(things, self.patch)
        share, thing = things.flatten(2).max(1)  # [B, N]
        told = torch.tensor([bool(caption) for caption in captions], device=things.device)
        row, place = torch.nonzero((share > SHOWN) & told[:, None], as_tuple=True)
        if not len(row):
            return tokens.new_zeros(())
        classes = torch.zeros(*things.shape[:2], len(CHOICES), dtype=torch.long)
        for number, caption in enumerate(captions):
            for order, named in enumerate(parse(caption).things if caption else ()):
                classes[number, order] = torch.tensor(classes_of(named))
        right = classes.to(things.device)[row, thing[row, place]]
        return errors_of(denoiser.namer(tokens[row, place]), right).sum(1).mean()
