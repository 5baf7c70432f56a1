"""All that is measured before a plan is made: kept in the state file, so that nothing is measured twice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_accel.compare import Job, Watch
from dit_accel.plan import Key
from dit_accel.search.plan import gains, measuring, probes, timing
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.state import Arrays, State
from dit_accel.search.plan.tables import full_is_faster
from dit_accel.search.plan.timing import ModuleSeconds, Seconds
from dit_accel.search.subject import Subject
from dit_accel.stages import now


@dataclass
class Survey:
    """Seconds of the dense pipeline, and prompt by prompt the errors of every choice.

    `fits(prompts, seconds)` says whether another prompt of so many seconds still fits into the budget, with a
    plan to be generated on all of them.
    """

    subject: Subject
    menu: Sequence[Candidate]
    ages: int
    state: State
    watch: Watch
    fits: Callable[[int, float], bool]
    seconds: Seconds = field(init=False)
    backend: frozenset[Key] = field(init=False)  # layers whose full attention is faster through one
    noted: list[dict[Key, Noted]] = field(default_factory=list[dict[Key, Noted]])  # prompt by prompt
    weights: np.ndarray = field(init=False)  # [P, T] of an error of the velocity in the frames

    @property
    def layers(self) -> list[Key]:
        """All that is planned."""
        return self.subject.all_attention()

    def take_seconds(self) -> None:
        """What comes first, as the budget is reckoned by it."""
        self.watch.generation(0, self._stages, "the dense pipeline")
        dense = self.state.once("dense", self._dense)
        modules = {key: ModuleSeconds(*dense[_told(key)].tolist()) for key in self.layers}
        whole, rest = map(float, dense["seconds"])
        self.seconds = Seconds(whole, rest, modules)
        self.backend = self._through_a_backend()

    def take_errors(self) -> None:
        """Those of as many prompts as fit into the budget, of one at least."""
        self.watch.generation(1, self._stages, "how attention errors are felt")
        felt = self.state.once("felt", self._felt)
        channels = {key: _channels(felt, key) for key in self.layers}
        weights, took = [], 0.0
        for number, job in enumerate(self.subject.jobs):
            began = now()
            if number and not self.fits(number, took):
                break
            self.watch.generation(2 + 2 * number, self._stages, f"every choice, on {job.prompt!r}")
            self.noted.append(self._scores(number, job, channels))
            self.watch.generation(3 + 2 * number, self._stages, f"what errors come to, on {job.prompt!r}")
            weights.append(self._weights(number, job))
            took = max(took, now() - began)
        self.weights = np.stack(weights)

    @property
    def refused(self) -> list[str]:
        """Why candidates were left out of the menu."""
        return sorted({why for each in self.noted for one in each.values() for why in one.refused.values()})

    @property
    def _stages(self) -> int:
        return 2 + 2 * len(self.subject.jobs)

    def _through_a_backend(self) -> frozenset[Key]:
        """The layers whose full attention is faster through a backend: all of a kind, or none."""
        own = self.subject.layers()
        kinds = own, [key for key in self.layers if key not in own]
        timed = {tuple(kind): [self.seconds.modules[key] for key in kind] for kind in kinds}
        return frozenset(key for kind, seconds in timed.items() if full_is_faster(seconds) for key in kind)

    def _dense(self) -> Arrays:
        found = timing.measure(self.subject)
        return {"seconds": np.array([found.whole, found.rest])} | {
            _told(key): np.array([each.around, each.dense, each.full]) for key, each in found.modules.items()
        }

    def _felt(self) -> Arrays:
        felt = measuring.look_at_attention(self.subject)
        return {
            f"{_told(key)} {stream}": np.stack([channels[stream] for channels in of])
            for key, of in felt.items()
            for stream in range(len(of[0]))
        }

    def _scores(
        self, number: int, job: Job, channels: Mapping[Key, Sequence[measuring.Channels]]
    ) -> dict[Key, Noted]:
        def measure() -> Arrays:
            noted = measuring.score(self.subject, self.menu, self.ages, channels, job, told=self.watch.step)
            return {
                f"{_told(key)}: {name}": a for key, each in noted.items() for name, a in each.arrays().items()
            }

        arrays = self.state.once(f"scores {number}", measure)
        found: dict[Key, Arrays] = {key: {} for key in self.layers}
        for key, own in found.items():
            mark = f"{_told(key)}: "
            own.update({name.removeprefix(mark): a for name, a in arrays.items() if name.startswith(mark)})
        near = self.subject.layers()  # the others have no menu
        noted = {key: Noted.read(own, self.menu if key in near else ()) for key, own in found.items()}
        for key, factors in self._gains(job, noted).items():
            noted[key].scale(factors)
        return noted

    def _gains(self, job: Job, noted: Mapping[Key, Noted]) -> dict[Key, np.ndarray]:
        """Looked at on the first prompt; the others take the same."""

        def measure() -> Arrays:
            return {_told(key): each for key, each in gains.measure(self.subject, job, noted).items()}

        arrays = self.state.once("gains", measure)
        return {key: arrays[_told(key)] for key in self.layers}

    def _weights(self, number: int, job: Job) -> np.ndarray:
        noted = self.noted[number]
        return self.state.once(
            f"weights {number}",
            lambda: {"steps": probes.step_weights(self.subject, job, noted, self.backend, self.watch.step)},
        )["steps"]


def _told(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _channels(felt: Arrays, key: Key) -> list[measuring.Channels]:
    own = [felt[f"{_told(key)} {stream}"] for stream in range(2) if f"{_told(key)} {stream}" in felt]
    return [tuple(table[step] for table in own) for step in range(len(own[0]))]
