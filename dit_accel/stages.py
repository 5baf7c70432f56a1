"""Where the seconds of a pipeline call go: text encoding, denoising, decoding, other.

Text encoding is the time inside `encode_prompt`, denoising the time inside the progress bar that every
diffusers pipeline opens around its loop, decoding all that follows it. Both names are shadowed on the
pipeline object and put back afterwards: no module is touched and no result changes.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.std import tqdm

STAGES = ("text_encoding", "denoising", "decoding", "other")
OnStep = Callable[[int, int], None]  # steps done, steps in all


def now() -> float:
    """Seconds, read when the device has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds of one pipeline call; complete when `stages` has closed."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.started = now()
        self.loop_ended: float | None = None
        self.total = 0.0

    def finish(self) -> None:
        """Stop: what came after the loop was decoding, and the unassigned rest is `other`."""
        end = now()
        self.total = end - self.started
        if self.loop_ended is not None:
            self.spent["decoding"] = end - self.loop_ended
        self.spent["other"] = max(0.0, self.total - sum(self.spent.values()))


@contextmanager
def stages(pipe: Any, on_step: OnStep | None = None) -> Iterator[Stopwatch]:
    """Time the one call of `pipe` made inside; `on_step` hears of every denoising step."""
    watch = Stopwatch()
    shadows = {"progress_bar": _watched_bar(watch, on_step)}
    if hasattr(pipe, "encode_prompt"):
        shadows["encode_prompt"] = _timed(pipe.encode_prompt, watch, "text_encoding")
    before = {name: pipe.__dict__[name] for name in shadows if name in pipe.__dict__}
    pipe.__dict__.update(shadows)
    try:
        yield watch
    finally:
        for name in shadows:
            del pipe.__dict__[name]
        pipe.__dict__.update(before)
        watch.finish()


def _timed(function: Callable[..., Any], watch: Stopwatch, stage: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            watch.spent[stage] += now() - start

    return timed


def _watched_bar(watch: Stopwatch, on_step: OnStep | None) -> Callable[..., tqdm]:
    """A stand-in for `pipe.progress_bar`: silent, and tells the watch when the loop starts and ends."""

    class Bar(tqdm):
        def __init__(self, iterable: Any = None, total: int | None = None) -> None:
            items = list(iterable) if iterable is not None else None
            self.steps, self.begun, self.open = total if items is None else len(items), now(), True
            self.ran = 0
            super().__init__(items, total=self.steps, disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            self.ran += int(n or 0)
            if on_step is not None:
                on_step(self.ran, self.steps or 0)
            return None

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()
            self.close()

        def close(self) -> None:
            if getattr(self, "open", False):  # tqdm closes again when it is deleted
                self.open = False
                watch.loop_ended = now()
                watch.spent["denoising"] += watch.loop_ended - self.begun
            super().close()

    return Bar
