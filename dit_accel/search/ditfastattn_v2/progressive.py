"""DiTFastAttnV2's search: head by head along one generation, on inputs that are compressed so far.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.3. A denoiser's first step is full. At
every later step and layer the full output y of each head and what every candidate would answer are compared;
a candidate with an error of c delta / H and more is out, and of the others a 0/1 program per layer and step
takes those that save the most while their errors add up to delta at most. Where errors are felt ones, ours,
one price takes the place of these programs (see `price`). What was decided is run at once,
so the layers and steps after it are searched on its output, and no second run is needed.

With guidance each branch decides for itself, whether it comes in a batch with the other or alone. Between two
decisions, `interval` steps apart, a head keeps its pick; where that has become too old it is full for a step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel import block_heads
from dit_accel.errors import Slower, Unmet
from dit_accel.memory import Memory
from dit_accel.plan import Key
from dit_accel.search.ditfastattn_v2.candidates import ABSENT, FULL, REUSE, SHARES, Candidate, Menu
from dit_accel.search.ditfastattn_v2.felt_error import FeltError
from dit_accel.search.ditfastattn_v2.head_error import Projected, rse
from dit_accel.search.ditfastattn_v2.knapsack import NONE, solve
from dit_accel.search.ditfastattn_v2.modules import letters_of
from dit_accel.search.ditfastattn_v2.price import Price
from dit_accel.search.ditfastattn_v2.trial import Layer
from dit_accel.search.method import Decided, Ended, TimeIsUp, Told
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind

SHARE = 1.5  # c: a head may take so many times its equal share of delta
AROUND = 2.0  # what a product of a projection takes, with norms and RoPE beside it, of one of attention's

Errors = dict[str, list[float | None]]  # letter -> error of each head, None where it was not legal


@dataclass
class HeadDecisions(Decided):
    """All that a search has decided. A place is a layer on a branch: "cond transformer.blocks.0.attn1"."""

    picks: dict[str, list[str]] = field(
        default_factory=dict[str, list[str]]
    )  # place -> [step] a letter a head
    errors: dict[str, dict[str, Errors]] = field(
        default_factory=dict[str, dict[str, Errors]]
    )  # place -> step

    @property
    def steps(self) -> int:
        return max(map(len, self.picks.values()), default=0)

    def histories(self, place: str, steps: int, heads: int) -> list[str]:
        """What each head of a place did at the first `steps` steps; what was not decided is full."""
        row = self.picks.get(place, [])[:steps]
        texts = [text or ABSENT * heads for text in row] + [FULL * heads] * (steps - len(row))
        return ["".join(text[head] for text in texts) for head in range(heads)]


def place_of(branch: str, key: Key) -> str:
    """The name of a layer on a branch."""
    return f"{branch} {key[0]}.{key[1]}"


@dataclass(frozen=True)
class Terms:
    """What is decided by."""

    menu: Menu
    delta: float
    error: str  # "projected", "head" or "felt"
    interval: int
    joint: bool = False  # whether text shares the attention
    felt: Mapping[Key, FeltError] = field(default_factory=dict[Key, FeltError])  # where errors are felt ones


class Progressive:
    """One search along one run of the pipeline. Raises TimeIsUp out of a visit when `ended`."""

    def __init__(
        self, terms: Terms, steps: int, decisions: HeadDecisions, ended: Ended, saved: Callable[[], None],
        told: Told,
    ):  # fmt: skip
        self.terms, self.steps, self.decisions = terms, steps, decisions
        self.ended, self.saved, self.told = ended, saved, told
        self.memory = Memory()
        self.visits = 0
        self.first_visits: set[str] = set()  # places of the first step
        self.unusable: set[str] = set()  # letters that run dense here, or cannot run
        self._projected: dict[Key, Projected] = {}
        self._wrong: dict[Key, Tensor] = {}  # with cond's visual rows at this step

    def answer(self, visit: AttentionVisit, key: Key, branch: str, attention: Any) -> Tensor:
        """One layer on one branch at one step: decide where it is open, and run what is decided."""
        place, step = place_of(branch, key), visit.step
        layer = Layer(self.terms.menu, self.memory, key, branch)
        row = self.decisions.picks.setdefault(place, [])
        self._count(place, step)
        if step >= len(row):
            row += [""] * (step - len(row))  # another denoiser ran
            letters, errors = self._decide(visit, layer, row, attention)
            row.append(letters)
            self.decisions.errors.setdefault(place, {})[str(step)] = errors
            self.saved()
        out = layer.answer(visit, row[step], self._cond(layer, step))
        if branch == "cond" and self.terms.felt:
            self._note_wrong(visit, layer, row[step], out)
        if step > 0:
            self.told(self.visits, self.steps * len(self.first_visits))
        return out

    def _cond(self, layer: Layer, step: int) -> str:
        """What cond's heads of a layer did at this step; empty for cond itself."""
        if layer.branch == "cond":
            return ""
        return self.decisions.picks[place_of("cond", layer.key)][step]

    def _pasts_of_cond(self, layer: Layer, steps: int, heads: int) -> list[str]:
        """What cond's heads did up to this very step; empty for cond itself."""
        if layer.branch == "cond":
            return [""] * heads
        return self.decisions.histories(place_of("cond", layer.key), steps + 1, heads)

    def _note_wrong(self, visit: AttentionVisit, layer: Layer, letters: str, out: Tensor) -> None:
        """What uncond has to reckon with."""
        self._wrong.pop(layer.key, None)
        if set(letters) != {FULL}:
            wrong = out - layer.full(visit, range(len(letters)))
            self._wrong[layer.key] = wrong[:, visit.visual_rows]

    def _count(self, place: str, step: int) -> None:
        self.visits += 1
        if step == 0:
            self.first_visits.add(place)

    def _decide(
        self, visit: AttentionVisit, layer: Layer, row: list[str], attention: Any
    ) -> tuple[str, Errors]:
        """The letters of all heads, and the errors behind them."""
        heads, ran = visit.q.shape[2], [text for text in row if text]
        if not ran:
            return FULL * heads, {}
        histories = self.decisions.histories(place_of(layer.branch, layer.key), len(row), heads)
        since = (len(ran) - 1) % self.terms.interval
        if since:
            held = ran[len(ran) - since]
            conds = self._pasts_of_cond(layer, len(row), heads)
            legal = [self.terms.menu.legal(*each) for each in zip(held, histories, conds, strict=True)]
            return "".join(x if may else FULL for x, may in zip(held, legal, strict=True)), {}
        if self.ended():
            raise TimeIsUp("the budget of this search is used up")
        return self._choose(visit, layer, histories, attention)

    def _choose(
        self, visit: AttentionVisit, layer: Layer, histories: list[str], attention: Any
    ) -> tuple[str, Errors]:
        """Try every candidate, and solve the program."""
        heads = range(visit.q.shape[2])
        y, conds = layer.full(visit, heads), self._pasts_of_cond(layer, len(histories[0]), len(heads))
        found: dict[str, np.ndarray] = {}
        gains: list[float] = []
        for candidate in self.terms.menu.candidates:
            pasts = enumerate(zip(histories, conds, strict=True))
            legal = [head for head, past in pasts if self.terms.menu.legal(candidate.letter, *past)]
            if candidate.letter in self.unusable or not legal:
                continue
            errors = self._errors(visit, layer, candidate, legal, y, attention)
            if errors is not None:
                found[candidate.letter] = errors
                gains.append(_gain(visit, candidate))
        noted = {letter: _rounded(errors) for letter, errors in found.items()}
        if not found:
            return FULL * len(heads), {}
        if self.terms.felt:
            return self._by_price(visit, layer, found, gains, y), noted
        return self._by_program(found, gains), noted

    def _by_program(self, found: Mapping[str, np.ndarray], gains: list[float]) -> str:
        table, letters = np.stack(list(found.values()), axis=1), [*found]
        delta, heads = self.terms.delta, len(table)
        chosen = solve(table, gains, delta, cap=SHARE * delta / heads)
        return "".join(FULL if number == NONE else letters[number] for number in chosen)

    def _by_price(
        self,
        visit: AttentionVisit,
        layer: Layer,
        found: Mapping[str, np.ndarray],
        gains: list[float],
        y: Tensor,
    ) -> str:
        """Full is a candidate like any other: what cond did is felt there too."""
        heads, step = y.shape[2], visit.step
        errors = {FULL: self._felt(visit, layer, y, y), **found}
        work = {FULL: 1.0} | {x: 1.0 - gain for x, gain in zip(found, gains, strict=True)}
        cond, uncond = (
            self.decisions.picks.get(place_of(branch, layer.key), [])[: step + 1]
            for branch in ("cond", "uncond")
        )
        modules: dict[str, float] = {}
        for letter in (REUSE, *SHARES):
            if letter not in found or not np.isfinite(found[letter]).all():
                continue
            own = letter * heads
            if layer.branch == "cond" or letters_of(cond, [*uncond, own], self.terms.joint)[1][-1] == letter:
                modules[letter] = float(found[letter].sum())
        width = visit.v.shape[3]
        around = AROUND * 2 * heads * heads * width / y.shape[1]
        return Price(self.terms.delta, around).choose(errors, work, modules)

    def _felt(self, visit: AttentionVisit, layer: Layer, y: Tensor, other: Tensor) -> np.ndarray:
        """Errors [H] of the answers of all heads."""
        error, wrong = self.terms.felt[layer.key], other - y
        visual, text = wrong[:, visit.visual_rows], wrong[:, visit.text_rows]
        if layer.branch == "cond":
            return error.of_cond(visit.step, visual, text)
        return error.of_uncond(visit.step, visual, text, self._wrong.get(layer.key))

    def _errors(
        self, visit: AttentionVisit, layer: Layer, candidate: Candidate, heads: list[int], y: Tensor,
        attention: Any,
    ) -> np.ndarray | None:  # fmt: skip
        """Errors [H] of a candidate, inf where it is not legal; None where it does not serve here."""
        try:
            other = layer.tried(visit, candidate, heads)
        except (Slower, Unmet) as reason:
            self.unusable.add(candidate.letter)
            self.decisions.note(f"{candidate.name} is left out: {reason}")
            return None
        if self.terms.felt:
            every = y.clone()
            every[:, :, block_heads.run_of(heads)] = other
            errors = torch.from_numpy(self._felt(visit, layer, y, every)[heads])
        elif self.terms.error == "head":
            errors = rse(y[:, :, block_heads.run_of(heads)], other)
        else:
            if layer.key not in self._projected:
                self._projected[layer.key] = Projected(attention, y)
            errors = self._projected[layer.key].errors(y, other, heads, visit.text_rows)
        found = np.full(y.shape[2], np.inf)
        found[heads] = errors.cpu().numpy()
        return found


def _gain(visit: AttentionVisit, candidate: Candidate) -> float:
    def density() -> float:
        return block_heads.plan_alone(visit.tokens(), candidate.method.near, Kind.ATTEND).density

    return candidate.gain(prod(visit.grid), visit.q.shape[1], density)


def _rounded(errors: np.ndarray) -> list[float | None]:
    """For the state file and the page: four digits, None where a candidate was not legal."""
    return [float(f"{error:.3e}") if np.isfinite(error) else None for error in errors]
