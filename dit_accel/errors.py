"""Every error a user can meet: what was asked, what was found, what to do."""

import difflib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base of all errors raised by dit_accel."""


class RecipeError(DitAccelError):
    """A recipe that cannot be read, or does not fit its pipeline. Starts with `file:line:` when known."""


class UnsupportedPipeline(DitAccelError):
    """The pipeline, or one of its parts, is not something we know how to patch."""


class OtherCache(DitAccelError):
    """Another cache is enabled on the pipeline: what it skips and what we skip would not be told apart."""


class AlreadyAccelerated(DitAccelError):
    """The pipeline already carries a recipe; restore it first or pass `replace=True`."""


class MissingAnchor(DitAccelError):
    """A method needs a stored output that no earlier step of this run has produced."""


class Unmet(DitAccelError):
    """A method cannot run at this visit; the message completes "X ran dense where M was planned: ..."."""


class Slower(DitAccelError):
    """A method would be slower than the model's own attention; the message completes "M runs dense: ..."."""


class MemoryBound(DitAccelError):
    """The memory a recipe would keep is over the bound it states."""


class NothingDone(DitAccelError):
    """Raised under `strict=True` when a recipe that should change work changed none."""


class DenseFallback(DitAccelError):
    """Raised under `strict=True` where a site would have fallen back to the model's own computation."""


class ToyError(DitAccelError):
    """A caption outside the toys' vocabulary, or a toy folder that is not what it should be."""


class BadUsage(DitAccelError):
    """A command line that cannot be carried out as asked: nothing was started (exit code 2)."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The `count` known names closest to `name`, as text for an error message."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.0)
    return ", ".join(close) if close else "none"
