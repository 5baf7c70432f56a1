"""The table of rivals: what each is called, its settings from careful to bold, and where it is not valid.

A setting is written behind a colon: `first_block_cache:0.1`. The ladders were chosen so that the toys reach
from about 1.3 to 4 times dense; on other models a threshold means something else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dit_accel.bench import dbcache, diffusers_caches
from dit_accel.bench.scene import Scene
from dit_accel.bench.traces import no_trace
from dit_accel.errors import BadUsage, nearest

Setting = float | int | str
Calibrate = Callable[[Scene, Callable[[], Any]], dict[str, list[float]]]
STEPS = "steps"  # the same sampler with fewer steps: switched on by an argument of the call
FEWER = (0.8, 0.65, 0.55, 0.45, 0.35, 0.25)  # of the dense steps


@dataclass(frozen=True)
class Rival:
    """One way of others to be faster."""

    name: str
    ladder: tuple[Setting, ...]
    switch_on: Callable[[Scene, Any], None]
    why_not: Callable[[Scene], str | None]  # why it is not valid on a pipeline; None where it is
    calibrate: Calibrate | None = (
        None  # one run on a prompt that is not benched, given to the scene as ratios
    )


def _anywhere(scene: Scene) -> str | None:
    """What holds for every cache that keeps a memory for each context."""
    if scene.family.guidance == "sequential" and scene.guided and not scene.opens_contexts:
        return (
            f"{type(scene.pipe).__name__} opens no cache context: both guidance branches would share a memory"
        )
    return None


def _one_denoiser(scene: Scene) -> str | None:
    if len(scene.denoisers) > 1:
        return "it counts all steps on each denoiser, and this pipeline divides them among two"
    return _anywhere(scene)


def _tells_noise(scene: Scene) -> str | None:
    if scene.family.name != "wan" or not scene.opens_contexts:
        return (
            f"it needs the step and the noise level in the cache context, and {type(scene.pipe).__name__} "
            "gives none: it would run dense"
        )
    config: Any = next(iter(scene.denoisers.values())).config
    if config.in_channels != config.out_channels:
        return "it reads the generated latents from the input, which here also holds the start image"
    return None


def _batched(scene: Scene) -> str | None:
    if scene.family.guidance == "sequential" and scene.guided:
        return (
            "it keeps one memory for both guidance branches, and this pipeline runs them one after the other"
        )
    return None


def _splits_a_batch(scene: Scene) -> str | None:
    if scene.family.guidance == "sequential" or not scene.guided:
        return "it takes the second half of a batch for the conditional branch, and this pipeline has none"
    return None


def _installed(scene: Scene) -> str | None:
    return dbcache.missing()


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(
            "first_block_cache",
            (0.05, 0.08, 0.12, 0.2, 0.3, 0.5),
            diffusers_caches.first_block_cache,
            _anywhere,
        ),
        Rival(
            "mag_cache",
            (0.01, 0.02, 0.04, 0.08, 0.16),
            diffusers_caches.mag_cache,
            _one_denoiser,
            diffusers_caches.calibrate_mag_cache,
        ),
        Rival("taylorseer", (2, 3, 4, 6), diffusers_caches.taylorseer, _anywhere),
        Rival("taylorseer_sublayers", (2, 3, 4, 6), diffusers_caches.taylorseer_sublayers, _anywhere),
        Rival("seacache", (0.1, 0.2, 0.3, 0.5), diffusers_caches.seacache, _tells_noise),
        Rival("pab", (2, 4, 6), diffusers_caches.pab, _batched),
        Rival("fastercache", (2, 3, 5), diffusers_caches.fastercache, _splits_a_batch),
        Rival("cache_dit", (0.05, 0.08, 0.12, 0.2, 0.3, 0.5), dbcache.plain, _installed),
        Rival("cache_dit_taylor", (0.05, 0.08, 0.12, 0.2, 0.3, 0.5), dbcache.taylor, _installed),
        Rival("cache_dit_mask", ("slow", "medium", "fast", "ultra"), dbcache.masked, _installed),
    )
}
NAMES = (STEPS, *RIVALS)


@contextmanager
def switched_on(rival: Rival, setting: Setting, scene: Scene) -> Iterator[None]:
    """The rival for one run; afterwards the pipeline is as it was, also when the run raises."""
    with no_trace(scene):
        rival.switch_on(scene, setting)
        yield


def read_against(text: str) -> list[tuple[str, Setting | None]]:
    """`--against`: all, none, or names with or without a setting: (name, setting or None for the ladder)."""
    if text.strip() == "all":
        return [(name, None) for name in NAMES]
    if text.strip() == "none":
        return []
    asked = [word.strip().partition(":") for word in text.split(",") if word.strip()]
    if not asked:
        raise BadUsage(
            "asked for rivals; --against is empty. Give all, none, or names such as steps,cache_dit."
        )
    return [(_known(name), _setting(name, value) if colon else None) for name, colon, value in asked]


def _known(name: str) -> str:
    if name not in NAMES:
        raise BadUsage(
            f'asked to bench against "{name}"; nearest: {nearest(name, NAMES)}. '
            f"Known are all, none and {', '.join(NAMES)}."
        )
    return name


def _setting(name: str, value: str) -> Setting:
    kind = int if name == STEPS else type(RIVALS[name].ladder[0])
    choices = RIVALS[name].ladder if kind is str else None
    try:
        setting = kind(value)
    except ValueError as error:
        raise BadUsage(
            f'asked to bench against "{name}:{value}"; its setting is a number. Give one such as '
            f"{name}:{10 if name == STEPS else RIVALS[name].ladder[0]}."
        ) from error
    if (choices and setting not in choices) or (not choices and not 0 < float(setting) < float("inf")):
        known = f"one of {', '.join(map(str, choices))}" if choices else "a number above 0"
        raise BadUsage(f'asked to bench against "{name}:{value}"; its setting is {known}. Give such a one.')
    return setting


def fewer_steps(steps: int) -> Sequence[int]:
    """The ladder of `steps`: counts below the dense one, from many to few."""
    counts = {round(steps * share) for share in FEWER}
    return sorted((count for count in counts if 1 <= count < steps), reverse=True)
