"""The router's optimizer: AdamW within bounds, and dual ascent on the price of computing.

Source: HarmoniCa, arXiv:2410.01723, whose code clamps the table after every step. The ascent is ours: the
multiplier is moved by its logarithm, since nobody knows the scale of an error beforehand.
"""

from typing import Any

import torch

from dit_accel.train.harmonica.router import CERTAIN
from dit_accel.train.optimizer import Adam, Named


class DualAscent(Adam):
    """AdamW without decay on the table; `log_price` rises by `rate` times what is over the budget."""

    def __init__(self, named: Named, lr: float, rate: float = 0.0):
        parameters = dict(named)
        super().__init__([("table", parameters["table"])], lr, weight_decay=0.0)
        self.table, self.log_price, self.rate = parameters["table"], parameters["log_price"], rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; the gradient of `log_price` is minus what is over the budget."""
        super().step()
        self.table.clamp_(-CERTAIN, CERTAIN)
        if self.log_price.grad is not None:
            self.log_price.sub_(self.rate * self.log_price.grad)
