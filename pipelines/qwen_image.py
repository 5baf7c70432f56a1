"""Qwen-Image text to image, accelerated.

python pipelines/qwen_image.py --prompt "a bookshop window with a hand-painted sign" --out shop.png
"""

import argparse
from typing import Any

import torch
from diffusers import QwenImagePipeline

import dit_accel


def main() -> None:
    """Load, accelerate, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen-Image")
    parser.add_argument("--recipe", default="qwen-image/safe")
    parser.add_argument("--prompt", default='a bookshop window with a hand-painted sign that says "open"')
    parser.add_argument("--negative-prompt", default=" ", help="true guidance needs one, if only a space")
    parser.add_argument("--height", type=int, default=928)
    parser.add_argument("--width", type=int, default=1664)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="qwen_image.png")
    given = parser.parse_args()

    recipe = dit_accel.Recipe.load(given.recipe)
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    pipe: Any = QwenImagePipeline.from_pretrained(given.model, dtype=dtype).to(given.device)

    handle = dit_accel.accelerate(pipe, recipe)
    image = pipe(
        prompt=given.prompt,
        negative_prompt=given.negative_prompt,
        height=given.height,
        width=given.width,
        num_inference_steps=given.steps,
        true_cfg_scale=given.guidance,
        generator=torch.Generator("cpu").manual_seed(given.seed),
    ).images[0]  # pyright: ignore[reportAttributeAccessIssue]
    print(handle.report())
    image.save(given.out)


if __name__ == "__main__":
    main()
