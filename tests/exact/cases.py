"""Recipes and stand-ins for the tests of exact tables."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dit_accel.exact import weights
from dit_accel.recipe import Recipe


def tables(modulation: bool | str = True, text_kv: bool | str = True, extra: str = "") -> Recipe:
    """A recipe of exact tables alone."""
    words = [f'"{wish}"' if isinstance(wish, str) else str(wish).lower() for wish in (modulation, text_kv)]
    return Recipe.from_text(
        f"schema = 1\n[exact]\nmodulation = {words[0]}\ntext_kv = {words[1]}\n{extra}", name="tables"
    )


@contextmanager
def weights_that_leave(patch) -> Iterator[None]:
    """As beside an accelerator, with NaN where the weights were: whoever reads them is found out."""
    kept: dict[int, torch.Tensor] = {}

    def take(shelf, modules):
        for weight in weights._weights(modules):
            if id(weight) in kept:
                continue
            kept[id(weight)] = weight.data
            weight.data = torch.full_like(weight, float("nan"))
            shelf._away.append(weight)

    def put_back(shelf):
        for weight in shelf._away:
            weight.data = kept.pop(id(weight))
        shelf._away.clear()

    with patch.context() as patched:
        patched.setattr(weights.Shelf, "take", take)
        patched.setattr(weights.Shelf, "put_back", put_back)
        patched.setattr(weights, "sample", lambda _: [])  # theirs lie on the CPU unchanged
        patched.setattr("dit_accel.exact.hindrance.of_release", lambda *_: None)
        yield
    assert not kept, "some weights did not come back"
