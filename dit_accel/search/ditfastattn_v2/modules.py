"""Which attention modules need not run, as all of their heads take what is there.

A module's stored output stands for those of its heads only where it was made of the same ones: of a reuse,
where no head was shared at the module's last run; of a shared difference, where every head computed on both
branches at the last step at which both modules ran. Text of a joint attention is exact where a branch is
shared, so there the module runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.search.ditfastattn_v2.candidates import COPY, DIFFER, IDLE, REUSE, SHARES

RUNS = "C"


@dataclass
class _Modules:
    """What the modules of one layer have left behind."""

    joint: bool
    own: bool = True  # whether no head of uncond was shared when its module last ran
    apart: bool = False  # whether all heads computed when both modules last ran

    def step(self, cond: str, uncond: str) -> tuple[str, str]:
        """What both modules do at a step, by the letters of their heads."""
        theirs = self._uncond(uncond)
        reads = theirs == RUNS and set(SHARES) & {*uncond}  # heads that need those of cond
        ours = REUSE if {*cond} == {REUSE} and not reads else RUNS
        if theirs == RUNS:
            self.own = not set(SHARES) & {*uncond}
            if ours == RUNS:
                self.apart = not IDLE & {*cond, *uncond}
        return ours, theirs

    def _uncond(self, letters: str) -> str:
        able = {REUSE: self.own, COPY: not self.joint, DIFFER: not self.joint and self.apart}
        only = letters[0] if len({*letters}) == 1 else RUNS
        return only if able.get(only) else RUNS


def letters_of(cond: Sequence[str], uncond: Sequence[str], joint: bool) -> tuple[str, str]:
    """What the modules of a layer do at every step, by one text of letters a step: (cond, uncond)."""
    modules = _Modules(joint)
    pairs = [modules.step(*pair) for pair in zip(cond, uncond, strict=True)]
    return "".join(ours for ours, _ in pairs), "".join(theirs for _, theirs in pairs)
