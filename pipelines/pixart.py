"""PixArt-Sigma text to image, accelerated.

python pipelines/pixart.py --prompt "a glass of orange juice on a blue table" --out juice.png
"""

import argparse
from typing import Any

import torch
from diffusers import PixArtSigmaPipeline

import dit_accel


def main() -> None:
    """Load, accelerate, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    parser.add_argument("--recipe", default="pixart-sigma/safe")
    parser.add_argument("--prompt", default="a glass of orange juice on a blue wooden table, morning light")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--exact-size", action="store_true", help="do not round to a size seen in training")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="pixart.png")
    given = parser.parse_args()

    recipe = dit_accel.Recipe.load(given.recipe)
    dtype = torch.float32 if given.device == "cpu" else torch.float16
    pipe: Any = PixArtSigmaPipeline.from_pretrained(given.model, dtype=dtype).to(given.device)

    handle = dit_accel.accelerate(pipe, recipe)
    image = pipe(
        prompt=given.prompt,
        height=given.height,
        width=given.width,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        generator=torch.Generator("cpu").manual_seed(given.seed),
        use_resolution_binning=not given.exact_size,
    ).images[0]  # pyright: ignore[reportAttributeAccessIssue]
    print(handle.report())
    image.save(given.out)


if __name__ == "__main__":
    main()
