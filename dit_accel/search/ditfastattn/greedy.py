"""DiTFastAttn's greedy search: for each step and layer the strongest pick whose error is small enough.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.5 and its published code. The first step
stays full. At every later step k, on the latents that the picks of the earlier steps have led to, a dense
forward gives the reference a; then for each layer i in order the menu is tried, strongest first, with the
layers before i at their picks and those after it full. The first pick whose output b has

    |a - b|^2 / |a|^2 < delta (i + 1) / L

is taken, else the layer stays full. (The published code divides by the signed maximum of both elements,
which blows up where they are negative or near 0.) a and b are the outputs of all branches together, also
where a pipeline calls the denoiser once for each.

Every forward runs the pipeline's own denoiser under a plan of the session. A candidate of layer i begins at
block i: the paper's (T - 1)(2 + 4 L) forwards become about half.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dit_accel.errors import DenseFallback
from dit_accel.plan import Key, Plan, resolve
from dit_accel.search import forwards
from dit_accel.search.calls import Arguments
from dit_accel.search.ditfastattn import menu
from dit_accel.search.forwards import Forwards, Ran
from dit_accel.search.method import Decided, Ended, TimeIsUp, Told
from dit_accel.session import Session
from dit_accel.timeline import ALONE, Track

Losses = dict[str, float]  # pick -> error
EMPTY_LEGEND: dict[str, str] = {}


@dataclass
class Decisions(Decided):
    """All that a search has decided: for each step that ran one letter per layer of its denoiser."""

    picks: list[str] = field(default_factory=list[str])
    losses: list[list[Losses]] = field(default_factory=list[list[Losses]])  # [step][layer]
    components: list[str] = field(default_factory=list[str])  # [step]
    windows: bool = True  # until a window turns out to run dense here

    @property
    def steps(self) -> int:
        return len(self.picks)

    def history(self, component: str, layer: int, steps: int) -> str:
        """The picks of one layer at the first `steps` steps; a step that was not decided stays full."""
        texts = [
            (self.picks[k] if self.components[k] == component else menu.ABSENT * (layer + 1))
            if k < len(self.picks)
            else ""
            for k in range(steps)
        ]
        return "".join(text[layer] if layer < len(text) else menu.FULL for text in texts)


@dataclass(frozen=True)
class Layers:
    """The searched layers of a denoiser, in forward order: sites and the blocks that hold them."""

    sites: tuple[str, ...]
    blocks: tuple[int, ...]


class Greedy:
    """One search along one run of the pipeline."""

    def __init__(
        self, session: Session, modules: Mapping[str, nn.Module], layers: Mapping[str, Layers],
        near: Mapping[str, Any], delta: float, decisions: Decisions, ended: Ended, saved: Callable[[], None],
        told: Told,
    ):  # fmt: skip
        self.session, self.layers, self.near, self.delta = session, layers, near, delta
        self.decisions, self.ended, self.saved, self.told = decisions, ended, saved, told
        self.forwards = Forwards(session, modules, self._answer)
        self.first: dict[str, dict[str, Arguments]] = {}  # component -> branch -> arguments of its first step
        self.waiting: dict[str, tuple[Arguments, Any]] = {}  # branch -> its foreseen call and its answer
        self.step = -1
        self.window_tried = False
        self.levels: tuple[float, ...] = ()

    # ---- the pipeline's calls

    def _answer(self, component: str, arguments: Arguments) -> Any:
        """What the pipeline gets for one of its calls of a denoiser."""
        if self.waiting:
            branch = next(iter(self.waiting))
            foreseen, output = self.waiting.pop(branch)
            forwards.check_foreseen(component, branch, foreseen, arguments)
            return output
        first = self.first.setdefault(component, {})
        known = next(iter(first.values()), None)
        if known is None or forwards.same(arguments["timestep"], known["timestep"]):
            return self._first_step(component, arguments, first)
        self.step += 1
        calls = {next(iter(first)): arguments}
        for branch in list(first)[1:]:
            calls[branch] = forwards.other_branch(arguments, first, branch)
        outputs = dict(self._search_step(component, calls).outputs)
        answer = outputs.pop(next(iter(calls)))
        self.waiting = {branch: (calls[branch], output) for branch, output in outputs.items()}
        return answer

    def _first_step(self, component: str, arguments: Arguments, first: dict[str, Arguments]) -> Any:
        """A call of the denoiser's first step: it runs full, and tells which branches there are."""
        if not first:
            self.step += 1
            if self.step == len(self.decisions.picks):
                self._open_step(component)
                self.decisions.picks[self.step] = menu.FULL * len(self.layers[component].sites)
                self.decisions.losses[self.step] = [{} for _ in self.layers[component].sites]
        sequential = self.session.families[component].guidance == "sequential"
        branch = ("uncond" if first else "cond") if sequential else "both"
        # the first denoiser of a run begins with the plan that was installed: the session lays it anew
        plan = None if len(self.first) == 1 else self._commit_plan(component)
        output = self.forwards.run(component, {branch: arguments}, plan).outputs[branch]
        self.levels = self.session.tracker.levels
        first[branch] = arguments
        self.told(self.step, len(self.layers[component].sites))
        return output

    def _open_step(self, component: str) -> None:
        self.decisions.picks.append("")
        self.decisions.losses.append([])
        self.decisions.components.append(component)

    # ---- one step

    def _search_step(self, component: str, calls: dict[str, Arguments]) -> Ran:
        """Decide what is not decided yet, then run the step as decided; its values are kept."""
        if self.step == len(self.decisions.picks):
            self._open_step(component)
        layers, decided = len(self.layers[component].sites), len(self.decisions.picks[self.step])
        if decided < layers:
            reference = reached = self.forwards.run(component, calls, self._plan({}))
            if decided:
                reached = self.forwards.run(component, calls, self._evaluation_plan(component))
            for layer in range(decided, layers):
                if self.ended():
                    raise TimeIsUp("the budget of this search is used up")
                pick, losses, reached = self._choose(component, calls, layer, reference, reached)
                self.decisions.picks[self.step] += pick
                self.decisions.losses[self.step].append(losses)
                self.saved()
                self.told(self.step, layer + 1)
        return self.forwards.run(component, calls, self._commit_plan(component))

    def _choose(
        self, component: str, calls: dict[str, Arguments], layer: int, reference: Ran, reached: Ran
    ) -> tuple[str, Losses, Ran]:
        """The first pick of the menu whose error is under the threshold, and what it led to."""
        layers = self.layers[component]
        history = self.decisions.history(component, layer, self.step)
        threshold = self.delta * (layer + 1) / len(layers.sites)
        losses: Losses = {}
        for pick in menu.MENU:
            windowed = pick in (menu.WINDOW, menu.WINDOW_SHARE)
            if not menu.legal(pick, history, self._guided(component)):
                continue
            if windowed and not self.decisions.windows:
                continue
            key = component, layers.sites[layer]
            plan = self._plan({key: self._tracks(key, history + pick, keeps=False)})
            try:
                ran = self.forwards.run(component, calls, plan, layers.blocks[layer], reached.entered)
            except DenseFallback as reason:
                self.decisions.note(f"{key[1]}: {pick} was left out: {reason}")
                continue
            if windowed and not self._window_serves(key):
                self.decisions.windows = False
                self.decisions.note(
                    "windows run dense at this size, as that is faster here: left out of the menu"
                )
                continue
            losses[pick] = relative_error(reference, ran)
            if losses[pick] < threshold:
                return pick, losses, ran
        return menu.FULL, losses, reached

    def _guided(self, component: str) -> bool:
        first = self.first[component]
        return "both" in first or len(first) > 1

    def _window_serves(self, key: Key) -> bool:
        """Whether the heads of a site attended near at this step; all layers have one shape: asked once."""
        if self.window_tried:
            return True
        self.window_tried = True
        rows = [row for row in self.session.report().rows if row.site.endswith(key[1])]
        return all(ALONE not in row.ran[self.step] for row in rows if row.branch != "uncond")

    # ---- plans

    def _plan(self, tracks: Mapping[Key, tuple[Track | None, Track | None]]) -> Plan:
        heads = {key: track for key, (track, _) in tracks.items() if track is not None}
        timeline = {key: track for key, (_, track) in tracks.items() if track is not None}
        return Plan(heads, timeline, {}, self.levels, EMPTY_LEGEND, ())

    def _evaluation_plan(self, component: str) -> Plan:
        """What is decided of the running step; the rest is full, and nothing is kept."""
        found = {}
        for layer, pick in enumerate(self.decisions.picks[self.step]):
            if pick != menu.FULL:
                key = component, self.layers[component].sites[layer]
                history = self.decisions.history(component, layer, self.step)
                found[key] = self._tracks(key, history + pick, keeps=False)
        return self._plan(found)

    def _commit_plan(self, component: str) -> Plan:
        """All layers as decided up to this step, keeping whatever a later step may read."""
        found = {}
        for layer, site in enumerate(self.layers[component].sites):
            history = self.decisions.history(component, layer, self.step + 1)
            found[component, site] = self._tracks((component, site), history, keeps=True)
        return self._plan(found)

    def _tracks(self, key: Key, history: str, keeps: bool) -> tuple[Track | None, Track | None]:
        """A site's tracks (heads, module) for a history, by the library's own rules."""
        joint = "text" in self.session.families[key[0]].token_order
        rows = menu.rows_of(history, joint, storing=self.decisions.windows)
        if keeps:
            last = history.replace(menu.ABSENT, "").rstrip(menu.REUSE)[-1:]
            rows += menu.future(joint, self.decisions.windows, last in (menu.SHARE, menu.WINDOW_SHARE))
        else:
            rows += menu.apart(joint)
        rows += menu.idle(len(self.levels) - len(rows.cond))
        steps = len(rows.cond)
        # the plan is read by step, so any falling levels serve
        levels = tuple(1 - step / steps for step in range(steps))
        absent = {k for k, pick in enumerate(history) if pick == menu.ABSENT}
        runs = {key[0]: frozenset(range(steps)) - absent} if absent else {}
        recipe = menu.recipe_of({key: rows}, levels, self.near, {})
        plan = resolve(recipe, (self.session.denoisers[key[0]],), levels, runs)
        return plan.attention.get(key), plan.timeline.get(key)


def relative_error(reference: Ran, ran: Ran) -> float:
    """|a - b|^2 / |a|^2 over the outputs of all branches."""
    off = size = 0.0
    for branch, output in reference.outputs.items():
        a, b = (forwards.tensor_of(each).detach().double() for each in (output, ran.outputs[branch]))
        off += float((a - b).square().sum())
        size += float(a.square().sum())
    return off / size


def searched_layers(session: Session, sites: tuple[str, ...]) -> dict[str, Layers]:
    """The self-attention of every denoiser that is among `sites` ("component.site"), in forward order."""
    found = {}
    for component, denoiser in session.denoisers.items():
        own = tuple(site for site in denoiser.self_attention if f"{component}.{site}" in sites)
        found[component] = Layers(own, tuple(denoiser.blocks.index(s.rpartition(".")[0]) for s in own))
    return found
