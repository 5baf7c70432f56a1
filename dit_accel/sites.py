"""Addresses in a pipeline: which attention modules, sublayers, blocks and spans a recipe's pattern means."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dit_accel.errors import RecipeError, nearest
from dit_accel.recipe_check import DENOISER

_PATTERN = re.compile(
    r"(?:(?P<component>transformer(?:_\d+)?)\.)?(?P<list>[a-z_]+)\.(?P<index>\*|\d+|\d+-\d+)(?:\.(?P<child>\w+))?"
)

EVERYTHING = "*"  # all attention sites; on the timeline all blocks as one span


@dataclass(frozen=True)
class Denoiser:
    """What a plan must know of one denoiser; torch-free."""

    component: str  # its name on the pipeline: "transformer", "transformer_2"
    self_attention: Mapping[str, int]  # site -> heads
    cross_attention: Mapping[str, int]  # site -> heads
    blocks: tuple[str, ...]  # paths of the blocks, in forward order
    others: tuple[str, ...] = ()  # sublayers that are no attention: feed-forwards

    @property
    def attention(self) -> dict[str, int]:
        """All attention sites with their heads."""
        return {**self.self_attention, **self.cross_attention}

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Everything inside of a block that the timeline can address."""
        return (*self.attention, *self.others)


@dataclass(frozen=True)
class Span:
    """Consecutive blocks treated as one site."""

    site: str
    blocks: tuple[str, ...]


def match_attention(pattern: str, denoiser: Denoiser) -> list[str]:
    """Attention sites of `denoiser` a pattern names, in forward order; [] if it names none."""
    if pattern == EVERYTHING:
        return list(denoiser.attention)
    return [site for site in match_sublayers(pattern, denoiser) if site in denoiser.attention]


def match_sublayers(pattern: str, denoiser: Denoiser) -> list[str]:
    """Attention and feed-forward sites of `denoiser` a pattern names; [] if it names none."""
    parts = _PATTERN.fullmatch(pattern)
    if parts is None or parts["child"] is None or not _component_fits(parts, denoiser):
        return []
    return [site for site in denoiser.sublayers if _covers(parts, site)]


def match_whole(pattern: str, denoiser: Denoiser) -> bool:
    """Whether a pattern names the whole denoiser."""
    return pattern in (DENOISER, f"{denoiser.component}.{DENOISER}")


def match_span(pattern: str, denoiser: Denoiser) -> Span | None:
    """The span of blocks a pattern names, or None."""
    if pattern == EVERYTHING:
        return Span(pattern, denoiser.blocks)
    parts = _PATTERN.fullmatch(pattern)
    if parts is None or parts["child"] is not None or not _component_fits(parts, denoiser):
        return None
    blocks = tuple(block for block in denoiser.blocks if _covers(parts, block))
    wanted = _last(parts["index"])
    if not blocks or (wanted is not None and f"{parts['list']}.{wanted}" not in blocks):
        return None
    return Span(pattern.removeprefix(f"{denoiser.component}."), blocks)


def unmatched(pattern: str, denoisers: tuple[Denoiser, ...], where: str, table: str) -> RecipeError:
    """The error for a pattern that names nothing in the pipeline."""
    known = [site for one in denoisers for site in (DENOISER, *one.sublayers, *one.blocks)]
    return RecipeError(
        f'{where}: [{table}] "{pattern}" matches no site of this pipeline; '
        f"nearest: {nearest(pattern, known)}. "
        f"Use the module path inside the denoiser, `*` or a range such as 0-5 for the block number."
    )


def _component_fits(parts: re.Match[str], denoiser: Denoiser) -> bool:
    return parts["component"] in (None, denoiser.component)


def _covers(parts: re.Match[str], site: str) -> bool:
    name, number, *child = site.split(".")
    if name != parts["list"] or (parts["child"] is not None and [parts["child"]] != child):
        return False
    first, _, last = parts["index"].partition("-")
    return first == "*" or int(first) <= int(number) <= int(last or first)


def _last(index: str) -> int | None:
    return None if index == "*" else int(index.split("-")[-1])
