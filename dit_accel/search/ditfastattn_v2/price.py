"""One price for all layers and steps: what a layer's attention may cost in error for being saved.

Where errors of all layers and steps are in one currency the most is saved within a sum of errors if work has
one price everywhere (the Lagrangian of one budget), and no program is left to solve: each head takes what is
least in error + price * work, unless the whole module is less still where it need not run at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Price:
    """`delta`: the error that saving one layer's attention at a step, all of its module, is worth.

    `around` is the work of a module besides its heads, its projections, in heads.
    """

    delta: float
    around: float

    def choose(
        self, errors: Mapping[str, np.ndarray], work: Mapping[str, float], modules: Mapping[str, float]
    ) -> str:
        """A letter for every head: errors [H] and work of a head by letter.

        `modules` are letters with which the module need not run, with the error of all heads together.
        """
        letters = [*errors]
        heads = len(errors[letters[0]])
        price = self.delta / (heads + self.around)
        costs = np.stack([errors[x] + price * work[x] for x in letters], axis=1)
        best, least = "".join(letters[at] for at in costs.argmin(1)), costs.min(1).sum() + price * self.around
        for letter, error in modules.items():
            if error < least:
                best, least = letter * heads, error
        return best
