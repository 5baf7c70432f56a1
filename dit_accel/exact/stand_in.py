"""Answers in the place of submodules, for the length of one forward: nothing stays on a module."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

# called with the module's own forward, and what that was called with
Answer = Callable[..., Any]


@contextmanager
def standing_in(answers: Sequence[tuple[nn.Module, Answer]]) -> Iterator[None]:
    """Let `answer(forward, *args, **kwargs)` run where each module's forward would."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, answer in answers:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = functools.partial(answer, module.forward)
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
