"""CogVideoX text to video, accelerated.

python pipelines/cogvideox.py --prompt "a panda plays a guitar in a bamboo forest" --out panda.mp4
"""

import argparse
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

import dit_accel


def main() -> None:
    """Load, accelerate, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="zai-org/CogVideoX-2b")
    parser.add_argument("--recipe", default="cogvideox-2b/safe")
    parser.add_argument("--prompt", default="a panda plays a guitar in a bamboo forest")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--num-frames", type=int, default=49)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="cogvideox.mp4")
    given = parser.parse_args()

    recipe = dit_accel.Recipe.load(given.recipe)
    # the 2B checkpoint was trained in float16, the 5B in bfloat16
    dtype = (
        torch.float32 if given.device == "cpu" else torch.float16 if "2b" in given.model else torch.bfloat16
    )
    pipe: Any = CogVideoXPipeline.from_pretrained(given.model, dtype=dtype).to(given.device)
    pipe.vae.enable_tiling()

    handle = dit_accel.accelerate(pipe, recipe)
    frames = pipe(
        prompt=given.prompt,
        height=given.height,
        width=given.width,
        num_frames=given.num_frames,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        generator=torch.Generator("cpu").manual_seed(given.seed),
    ).frames[0]  # pyright: ignore[reportAttributeAccessIssue]
    print(handle.report())
    export_to_video(frames, given.out, fps=8)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
