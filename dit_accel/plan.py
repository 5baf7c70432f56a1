"""A recipe resolved against one pipeline and one schedule: (site, step, branch) -> what to do and keep.

Immutable. `check` compares a recipe with a pipeline before anything is touched; `resolve` is called when a
run starts and its noise levels are known. The legality rules (what may follow what) live in `timeline.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import RecipeError
from dit_accel.recipe import Recipe
from dit_accel.sites import (
    DENOISER,
    Denoiser,
    Span,
    match_attention,
    match_span,
    match_sublayers,
    match_whole,
    unmatched,
)
from dit_accel.timeline import ALONE, BRANCHES, FEW_STEPS, INPUT, Entry, Runs, Term, Terms, Track, lay

Key = tuple[str, str]  # (component, site)
SOURCES = {"c": "cond", "u": "uncond", "x": INPUT}  # the letters of [weights]
SAME_LEVEL = 1e-3  # nearer noise levels are one schedule: weights fitted on one serve the other


@dataclass(frozen=True)
class Plan:
    """What every site does at every step of one schedule."""

    attention: Mapping[Key, Track]
    timeline: Mapping[Key, Track]
    spans: Mapping[Key, Span]
    levels: tuple[float, ...]
    legend: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def approximates(self) -> bool:
        """Whether any entry is something else than the model's own computation."""
        return any(track.approximates for track in (*self.attention.values(), *self.timeline.values()))

    def entry(self, seam: str, key: Key, step: int, branch: str) -> Entry | None:
        """What the site does, or None where the recipe says nothing about it."""
        track = (self.attention if seam == "attention" else self.timeline).get(key)
        return None if track is None else track.entry(step, branch)

    def explain(self) -> str:
        """The plan as text: one line per site and branch, one column per step."""
        lines = [f"{len(self.levels)} steps, noise level {self.levels[0]:.3f} to {self.levels[-1]:.3f}"]
        for (component, site), track in (*self.timeline.items(), *self.attention.items()):
            for branch in track.branches:
                steps = " ".join(track.entry(step, branch).letters for step in range(len(self.levels)))
                lines.append(f"{component}.{site:<24} {branch:<7} {steps}")
        lines.append("  ".join(f"{letter} {name}" for letter, name in self.legend.items()))
        return "\n".join([*lines, *self.notes])


def check(recipe: Recipe, denoisers: tuple[Denoiser, ...]) -> None:
    """Raise RecipeError unless every pattern, letter and head count fits the pipeline; builds nothing."""
    steps = recipe.made_for.steps or 1
    levels = tuple(1 - step / steps for step in range(steps))
    _read(_Reader(recipe, denoisers, levels, few=False, runs={}))


def resolve(
    recipe: Recipe,
    denoisers: tuple[Denoiser, ...],
    levels: tuple[float, ...],
    runs: Mapping[str, frozenset[int]] | None = None,
) -> Plan:
    """The plan of a run whose steps have these noise levels (1 pure noise, 0 clean).

    `runs` names the steps each denoiser runs where they take turns; without it all run all steps.
    """
    return _read(_Reader(recipe, denoisers, levels, len(levels) <= FEW_STEPS, runs or {}))


def _read(reader: "_Reader") -> Plan:
    # the timeline first: attention inside a skipped block neither runs nor stores
    timeline = reader.read("timeline", reader.timeline_letters)
    attention = reader.read("attention", reader.attention_letters)
    return Plan(
        attention,
        timeline,
        reader.spans,
        reader.levels,
        reader.legend(),
        tuple(reader.notes(attention, timeline)),
    )


class _Reader:
    """Turns the two tables of a recipe into tracks."""

    def __init__(
        self, recipe: Recipe, denoisers: tuple[Denoiser, ...], levels: tuple[float, ...], few: bool,
        runs: Mapping[str, frozenset[int]],
    ):  # fmt: skip
        self.recipe, self.denoisers, self.levels, self.few, self.runs = recipe, denoisers, levels, few, runs
        if ALONE in recipe.choices:
            raise RecipeError(
                f'{recipe.where("choices", ALONE)}: the letter "{ALONE}" stands for what a recipe leaves to '
                f"the model and cannot be declared. Choose another letter."
            )
        self.methods: dict[str, Any] = {letter: recipe.method(letter) for letter in recipe.choices}
        self.spans: dict[Key, Span] = {}
        self.timeline: dict[Key, Track] = {}
        self.patterns: dict[tuple[str, Key, str], str] = {}  # (seam, key, branch) -> the pattern that won
        self.made_steps = recipe.made_for.steps
        self.mapped = self.made_steps not in (None, len(levels))
        self.fits = not few and _same_levels(levels, recipe.fitted_at)

    def read(self, seam: str, letters_of: Any) -> dict[Key, Track]:
        """Tracks of one table; a later pattern wins, a branch's own table wins over `both`."""
        found: dict[Key, dict[str, tuple[str, tuple[str, ...]]]] = {}
        table = getattr(self.recipe, seam)
        for branch in ("both", *BRANCHES):
            for pattern, value in table.get(branch, {}).items():
                where = self.recipe.where(seam, branch, pattern)
                sites = self._sites(seam, branch, pattern, where)
                for key, heads in sites.items():
                    letters = letters_of(value, heads, seam, where)
                    for one in BRANCHES if branch == "both" else (branch,):
                        found.setdefault(key, {})[one] = (where, letters)
                        self.patterns[seam, key, one] = pattern
        self._refuse_overlap(seam, found)
        self._refuse_double_storing(seam, found)
        tracks: dict[Key, Track] = {}
        # from the outside in: a sublayer inside a skipped block neither runs nor stores
        for key in sorted(found, key=lambda key: (key[1] != DENOISER, key not in self.spans)):
            tracks[key] = self._track(seam, key, found[key])
            if seam == "timeline":
                self.timeline[key] = tracks[key]
        return {key: tracks[key] for key in found}

    def _sites(self, seam: str, branch: str, pattern: str, where: str) -> dict[Key, int]:
        sites: dict[Key, int] = {}
        for one in self.denoisers:
            span = match_span(pattern, one) if seam == "timeline" else None
            if span is not None:
                sites[one.component, span.site] = 1
                self.spans[one.component, span.site] = span
            inside = match_sublayers(pattern, one) if seam == "timeline" else match_attention(pattern, one)
            if seam == "timeline" and match_whole(pattern, one):
                inside = [DENOISER]
            for site in inside:
                sites[one.component, site] = one.attention[site] if seam == "attention" else 1
        if not sites:
            raise unmatched(pattern, self.denoisers, where, f"{seam}.{branch}")
        return sites

    def attention_letters(self, strings: Any, heads: int, seam: str, where: str) -> tuple[str, ...]:
        """One string of letters per step, one letter per head, chosen by the step's noise level."""
        for text in strings:
            self._letters_fit(text, seam, where)
            if len(text) not in (1, heads):
                raise RecipeError(
                    f'{where}: "{text}" has {len(text)} letters, the site has {heads} heads. '
                    f"Write one letter per head, or one letter for all."
                )
        for letter in {letter for text in strings for letter in text}:
            if getattr(self.methods[letter], "order", 0):
                raise RecipeError(
                    f'{where}: "{letter}" is {self.recipe.choices[letter].method} of order '
                    f"{self.methods[letter].order}, which heads do not keep. Use order 0, or the timeline."
                )
        full = tuple(text * heads if len(text) == 1 else text for text in strings)
        return tuple(full[_interval(level, self.recipe.edges)] for level in self.levels)

    def timeline_letters(self, text: Any, heads: int, seam: str, where: str) -> tuple[str, ...]:
        """One letter per step; another step count takes the letter at the same relative position."""
        self._letters_fit(text, seam, where)
        made, now = len(text), len(self.levels)
        return tuple(text[min(made - 1, int((step + 0.5) * made / now))] for step in range(now))

    def _letters_fit(self, text: str, seam: str, where: str) -> None:
        for letter in text:
            if seam not in self.methods[letter].seams:
                raise RecipeError(
                    f'{where}: "{letter}" is {self.recipe.choices[letter].method}, which works in '
                    f"[{'] and ['.join(sorted(self.methods[letter].seams))}], not in [{seam}]."
                )

    def _track(self, seam: str, key: Key, rows: dict[str, tuple[str, tuple[str, ...]]]) -> Track:
        blank = tuple(ALONE * len(text) for text in next(iter(rows.values()))[1])
        letters = {branch: rows[branch][1] if branch in rows else blank for branch in BRANCHES}
        where = next(iter(rows.values()))[0]
        if seam == "attention":
            self._needs_grid(key, letters, where)
        explicit = seam == "timeline" and not self.mapped and not self.few and key[0] not in self.runs
        return lay(
            letters,
            self._method,
            strict=where if explicit else None,
            few=self.few,
            runs=self._reached(seam, key),
            fitted=self._fitted(key) if seam == "timeline" and self.fits else None,
        )

    def _fitted(self, key: Key) -> dict[str, Mapping[int, Terms]]:
        """What fitted answers of this site sum up: branch -> step -> terms."""
        found: dict[str, Mapping[int, Terms]] = {}
        for branch in BRANCHES:
            pattern = self.patterns.get(("timeline", key, branch), "")
            rows = self.recipe.weights.get(branch, {}).get(pattern, {})
            found[branch] = {step: _terms(weights) for step, weights in rows.items()}
        return found

    def _reached(self, seam: str, key: Key) -> Runs | None:
        """The steps at which a site is reached: its denoiser's turn, and nothing around it is skipped."""
        component, site = key
        around = [
            track
            for other, track in self.timeline.items()
            if other[0] == component and self._holds(other, site) and (seam, other) != ("timeline", key)
        ]
        if not around and component not in self.runs:
            return None
        turn = self.runs.get(component, frozenset(range(len(self.levels))))
        return {
            branch: frozenset(k for k in turn if all(track.entries[branch][k].computes for track in around))
            for branch in BRANCHES
        }

    def _holds(self, outer: Key, site: str) -> bool:
        span = self.spans.get(outer)
        if outer[1] == DENOISER:
            return True
        return outer[1] == site if span is None else site.rpartition(".")[0] in span.blocks

    def _method(self, letter: str) -> Any:
        return self.methods.get(letter)

    def _needs_grid(self, key: Key, letters: Mapping[str, tuple[str, ...]], where: str) -> None:
        component, site = key
        one = next(d for d in self.denoisers if d.component == component)
        used = {letter for texts in letters.values() for text in texts for letter in text}
        bad = [x for x in sorted(used) if x in self.methods and self.methods[x].needs_grid]
        if bad and site not in one.self_attention:
            raise RecipeError(
                f'{where}: "{bad[0]}" ({self.recipe.choices[bad[0]].method}) needs a token grid, '
                f"but {site} is cross-attention. Use it on {', '.join([*one.self_attention][:3])}."
            )

    def _refuse_overlap(self, seam: str, found: Mapping[Key, Any]) -> None:
        owner: dict[tuple[str, str], str] = {}
        for component, site in found:
            span = self.spans.get((component, site)) if seam == "timeline" else None
            for block in span.blocks if span else ():
                other = owner.setdefault((component, block), site)
                if other != site:
                    where = next(iter(found[component, site].values()))[0]
                    raise RecipeError(
                        f'{where}: spans "{other}" and "{site}" both hold {block}. Make them disjoint.'
                    )

    def _refuse_double_storing(self, seam: str, found: Mapping[Key, Any]) -> None:
        """A span that replays its sublayers stores them itself."""
        for (component, site), rows in found.items() if seam == "timeline" else ():
            span = self.spans.get((component, site))
            used = {self.methods[letter] for _, letters in rows.values() for letter in letters}
            if span is None or not any(getattr(method, "gates", "") == "current" for method in used):
                continue
            for other, inside in found:
                if other == component and inside.rpartition(".")[0] in span.blocks:
                    where = next(iter(found[other, inside].values()))[0]
                    raise RecipeError(
                        f'{where}: {inside} has letters of its own, and the span "{site}" around it replays '
                        'it with gates = "current". Give it gates = "stored", or leave the sublayer out.'
                    )

    def legend(self) -> dict[str, str]:
        """Letters with the methods behind them."""
        return {ALONE: "the model's own", **{letter: str(method) for letter, method in self.methods.items()}}

    def notes(self, *tables: Mapping[Key, Track]) -> list[str]:
        """What the user should know of how this recipe was fitted to this run."""
        notes: list[str] = []
        if self.mapped and self.recipe.timeline and not self.recipe.is_neutral():
            notes.append(
                f"the recipe was made for {self.made_steps} steps and is mapped to {len(self.levels)}"
            )
        if self.recipe.weights and not self.fits and not self.few:
            notes.append(
                "the noise levels are not those its weights were fitted at: forecasts use their own rule"
            )
        if self.few and not self.recipe.is_neutral():
            notes.append(
                f"{len(self.levels)} steps are too few for reuse and sharing (limit {FEW_STEPS}): all compute"
            )
        changed = sum(track.upgraded for table in tables for track in table.values())
        if changed and (self.mapped or self.runs):
            notes.append(f"{changed} reuse or share entries became compute to stay within their max_age")
        return notes


def _terms(weights: Mapping[str, float]) -> Terms:
    return tuple(Term(SOURCES[name[0]], int(name[1:]), weight) for name, weight in weights.items())


def _same_levels(levels: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(levels) == len(others) and all(
        abs(level - other) <= SAME_LEVEL for level, other in zip(levels, others, strict=True)
    )


def _interval(level: float, edges: tuple[float, ...]) -> int:
    """The index of the noise interval that holds `level`; edges fall from 1 to 0."""
    inside = sum(1 for edge in edges[1:-1] if level <= edge)
    return min(inside, len(edges) - 2)
