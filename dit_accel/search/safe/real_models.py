"""Facts of real checkpoints that a rule needs to write a recipe without loading them.

Every row says where its numbers were read. The checkpoints' own config.json files were not at hand:
`accelerate` compares the recipe with the loaded model, and names a block that is not there.
"""

import math
from dataclasses import dataclass

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class RealModel:
    """One checkpoint at the size and step count it is usually run."""

    folder: str  # of its recipes
    model: str  # Hub id
    denoiser: str  # class name
    depth: int  # blocks
    heads: int
    head_width: int
    steps: int
    grid: Grid  # visual tokens: frames, rows, columns
    largest: Grid  # the largest usual size, for the memory bound
    text: int  # text tokens that run beside the visual ones; 0 where text stays outside the stream
    read_from: str
    denoisers: int = 1  # transformers of that kind, which take turns

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def residual_bytes(self) -> int:
        """One stored residual of one sample (all streams, two-byte numbers) at the largest usual size."""
        return 2 * self.denoisers * (math.prod(self.largest) + self.text) * self.width


_WAN_SIZES = "diffusers scripts/convert_wan_to_diffusers.py; steps and size: defaults of WanPipeline 0.42.1"
_COG_SIZES = (
    "diffusers scripts/convert_cogvideox_to_diffusers.py; size: CogVideoXTransformer3DModel defaults "
    "(60 x 90 latents, 49 frames, 226 text tokens); steps: default of CogVideoXPipeline 0.42.1"
)

MODELS = (
    RealModel(
        folder="wan2.1-t2v-1.3b", model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", denoiser="WanTransformer3DModel",
        depth=30, heads=12, head_width=128, steps=50, grid=(21, 30, 52), largest=(21, 30, 52), text=0,
        read_from=_WAN_SIZES,
    ),
    RealModel(
        folder="wan2.1-t2v-14b", model="Wan-AI/Wan2.1-T2V-14B-Diffusers", denoiser="WanTransformer3DModel",
        depth=40, heads=40, head_width=128, steps=50, grid=(21, 30, 52), largest=(21, 45, 80), text=0,
        read_from=_WAN_SIZES,
    ),
    RealModel(
        folder="wan2.2-t2v-a14b", model="Wan-AI/Wan2.2-T2V-A14B-Diffusers", denoiser="WanTransformer3DModel",
        depth=40, heads=40, head_width=128, steps=40, grid=(21, 45, 80), largest=(21, 45, 80), text=0,
        denoisers=2,
        read_from="a copy of Wan 2.2's published configuration (num_layers 40, num_heads 40, "
        "sample_steps 40); size: 1280 x 720, 81 frames, not checked against the checkpoint's page",
    ),
    RealModel(
        folder="cogvideox-2b", model="THUDM/CogVideoX-2b", denoiser="CogVideoXTransformer3DModel",
        depth=30, heads=30, head_width=64, steps=50, grid=(13, 30, 45), largest=(13, 30, 45), text=226,
        read_from=_COG_SIZES,
    ),
    RealModel(
        folder="cogvideox-5b", model="THUDM/CogVideoX-5b", denoiser="CogVideoXTransformer3DModel",
        depth=42, heads=48, head_width=64, steps=50, grid=(13, 30, 45), largest=(13, 30, 45), text=226,
        read_from=_COG_SIZES,
    ),
    RealModel(
        folder="pixart-sigma", model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        denoiser="PixArtTransformer2DModel",
        depth=28, heads=16, head_width=72, steps=20, grid=(1, 64, 64), largest=(1, 64, 64), text=0,
        read_from="PixArtTransformer2DModel defaults (28 layers, 16 x 72, 128 latents); "
        "steps: default of PixArtSigmaPipeline 0.42.1",
    ),
    RealModel(
        folder="qwen-image", model="Qwen/Qwen-Image", denoiser="QwenImageTransformer2DModel",
        depth=60, heads=24, head_width=128, steps=50, grid=(1, 64, 64), largest=(1, 83, 83), text=1024,
        read_from="QwenImageTransformer2DModel defaults (60 layers, 24 x 128); size, steps and the bound of "
        "1024 text tokens: QwenImagePipeline 0.42.1; largest size: 1328 x 1328 of the model's own example",
    ),
)  # fmt: skip
