"""One rank of a context-parallel run of a tiny pipeline on CPUs: `python ulysses_worker.py JOB.json RANK`.

The job names the case, its recipes (null: plain), whether they are installed before or after
`enable_parallelism`, and the call's arguments. Rank r leaves, for each recipe, its latents, the shapes of its
attention calls and the report in `rank<r>.pt`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor


def pretend_the_cpu_is_an_accelerator() -> None:
    """`enable_parallelism` asks torch for its accelerator, of which a CPU-only build has none."""
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda *_: SimpleNamespace(type="cpu")


@contextmanager
def watched_attention(shapes: list[tuple[int, ...]]) -> Iterator[None]:
    """Note the query shape [B, H, N, D] of every dense attention of this rank."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return plain(query, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = noted
    yield
    torch.nn.functional.scaled_dot_product_attention = plain


def shard(pipe: DiffusionPipeline, ranks: int) -> None:
    """Split the sequence over the ranks, Ulysses style: each attends to all tokens with some of the heads."""
    for name in ("transformer", "transformer_2"):
        denoiser = getattr(pipe, name, None)
        if denoiser is not None:
            denoiser.set_attention_backend("native")
            denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))


def run(job: dict[str, Any], recipe: str | None) -> dict[str, Any]:
    """One run of the job on this rank, on a new pipeline, inside a process group."""
    import dit_accel
    from dit_accel.testing import TINY

    case = TINY[job["case"]]
    if job["text_tokens"]:
        case = replace(case, text_tokens=tuple(job["text_tokens"]))
    pipe, handle, shapes = case.build(), None, []
    if recipe and job["order"] == "accelerate first":
        handle = dit_accel.accelerate(pipe, recipe)
    shard(pipe, dist.get_world_size())
    if recipe and job["order"] == "parallelism first":
        handle = dit_accel.accelerate(pipe, recipe)
    with watched_attention(shapes):
        latents = case.call(pipe, **job["call"])
    return {"latents": latents, "shapes": shapes, "report": str(handle.report()) if handle else None}


def main(job_file: Path, rank: int) -> None:
    """Join the group, run, leave the result."""
    job = json.loads(job_file.read_text())
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    pretend_the_cpu_is_an_accelerator()
    dist.init_process_group(
        "gloo", init_method=f"file://{job_file.with_name('rendezvous')}", rank=rank, world_size=job["ranks"]
    )
    results = [run(job, recipe) for recipe in job["recipes"]]
    latents = {str(i): result.pop("latents").contiguous() for i, result in enumerate(results)}
    save_file(latents, job_file.with_name(f"rank{rank}.safetensors"))
    job_file.with_name(f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    # no teardown: gloo's threads sometimes abort a process that has already left its result
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
