"""Wan 2.1 text to video, accelerated.

python pipelines/wan.py --prompt "a cat on a skateboard" --out cat.mp4
python pipelines/wan.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --recipe my.toml --height 720 --width 1280
"""

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import dit_accel


def main() -> None:
    """Load, accelerate, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--recipe", default="wan2.1-t2v-1.3b/safe")
    parser.add_argument("--prompt", default="a cat on a skateboard rolls down a quiet street")
    parser.add_argument("--negative-prompt", default="static, blurred, overexposed, low quality, subtitles")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="wan.mp4")
    given = parser.parse_args()

    recipe = dit_accel.Recipe.load(given.recipe)
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(given.model, subfolder="vae", dtype=torch.float32)
    pipe: Any = WanPipeline.from_pretrained(given.model, vae=vae, dtype=dtype).to(given.device)

    handle = dit_accel.accelerate(pipe, recipe)
    frames = pipe(
        prompt=given.prompt,
        negative_prompt=given.negative_prompt,
        height=given.height,
        width=given.width,
        num_frames=given.num_frames,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        generator=torch.Generator("cpu").manual_seed(given.seed),
    ).frames[0]  # pyright: ignore[reportAttributeAccessIssue]
    print(handle.report())
    export_to_video(frames, given.out, fps=16)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
