"""Dense answers, kept: a run that changes something late in the schedule takes all before it from them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dit_accel.search.calls import Steps, by_name

HOOK = "dit_accel_replay"


class Replay:
    """What the denoisers of a pipeline answered in one dense run, call by call."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.answers: list[Any] = []
        self.steps: list[int] = []  # the step of every call
        self.calls = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps every answer of the run inside."""
        self.answers, self.steps = [], []
        steps = Steps()

        def keep(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
            self.answers.append(answer)
            self.steps.append(steps.of(by_name(module, args, kwargs)))

        hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in self.modules.values()]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    @contextlib.contextmanager
    def until(self, step: int) -> Iterator[None]:
        """Answers all calls before `step` of the run inside with what was recorded; later ones run.

        To be opened after what else is installed on the denoisers, so that it comes first.
        """
        self.calls = 0
        for module in self.modules.values():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(_Answering(self, step), HOOK)
        try:
            yield
        finally:
            for module in self.modules.values():
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=False)


class _Answering(ModelHook):
    def __init__(self, replay: Replay, step: int):
        super().__init__()
        self.replay, self.step = replay, step

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        replay = self.replay
        number, replay.calls = replay.calls, replay.calls + 1
        if replay.steps[number] < self.step:
            return replay.answers[number]
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward(*args, **kwargs)
