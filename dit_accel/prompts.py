"""Which prompts and seeds a comparison runs on."""

from pathlib import Path

from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.loading import Model

GENERAL = (
    "A golden retriever runs along a beach at sunset, its paws splashing through shallow water",
    "A steam train crosses a stone viaduct in a green valley, white smoke drifting behind it",
    "A potter's hands shape a bowl of wet clay on a spinning wheel, close up",
    "A red paper lantern sways over a night market while people walk below",
    "A cat on a skateboard rolls down a quiet street lined with cherry trees",
    "Rain runs down a window, the lights of a city blurred behind it",
    "A glass of orange juice and a sliced orange on a blue wooden table, morning light",
    "A hot air balloon rises over snowy mountains, seen from a distance",
)
DEFAULT_COUNT = 2  # without a file, as every prompt is generated once in every column


def jobs(model: Model, file: Path | None, count: int | None, seed: int) -> list[Job]:
    """Prompts of a file, else the model's own held-out captions, else general ones; seeds count up."""
    if file is not None:
        prompts = read_prompts(file)[:count]
    elif model.draws_scenes:
        prompts = held_out_captions(count or DEFAULT_COUNT, seed, moving=model.output == "video")
    else:
        wanted = count or DEFAULT_COUNT
        prompts = [GENERAL[index % len(GENERAL)] for index in range(wanted)]
    return [Job(prompt, seed + index) for index, prompt in enumerate(prompts)]


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # are left out."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(
            f"asked for the prompts in {file}; it cannot be read ({error}). Give a text file."
        ) from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadUsage(f"asked for the prompts in {file}; it has none. Write one prompt a line.")
    return prompts


def held_out_captions(count: int, seed: int, moving: bool) -> list[str]:
    """Captions that the toys' training never saw."""
    import numpy as np

    from dit_accel.scenes import is_held_out, sample_scene

    draws, found = np.random.default_rng(seed), []
    while len(found) < count:
        caption = str(sample_scene(draws, moving))
        if is_held_out(caption) and caption not in found:
            found.append(caption)
    return found
