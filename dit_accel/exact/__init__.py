"""Exact tables: what is computed once instead of at every step, with equal bits.

    modulation   rows of the adaLN projections by the bits of the timestep; their weights leave the device
    text k/v     keys and values of cross-attention, once per prompt, branch and run

Both answer in the place of submodules while a forward runs and leave nothing on any module between two.
Where they cannot stand they step aside, and the report says why.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import other_caches
from dit_accel.exact import gain, hindrance
from dit_accel.exact.modulation import ModulationTables
from dit_accel.exact.stand_in import Answer, standing_in
from dit_accel.exact.text_kv import TextKV
from dit_accel.recipe import AUTO
from dit_accel.session import Session

MODULATION, TEXT_KV = "modulation", "text k/v"


class ExactTables:
    """The exact tables of one pipeline."""

    def __init__(self, session: Session, modules: Mapping[str, nn.Module], block_hooks: Sequence[Any]):
        self.session, self.modules, self._block_hooks = session, modules, block_hooks
        wish, neutral = session.recipe.exact, session.recipe.is_neutral()
        # a neutral recipe measures what being installed costs: it has tables only where it asks for them
        self._wishes = {
            name: False if neutral and wanted == AUTO else wanted
            for name, wanted in ((MODULATION, wish.modulation), (TEXT_KV, wish.text_kv))
        }
        self._modulation: dict[str, ModulationTables] = {}
        self._text_kv: dict[str, TextKV] = {}
        self._runs: dict[str, int] = {}  # component -> the run it was looked at in
        self._kinds: dict[str, set[str]] = {}  # component -> the tables it has in this run
        self._answers: list[tuple[nn.Module, Answer]] = []
        self._running: str | None = None

    def begin(self, component: str, inputs: Mapping[str, Any]) -> None:
        """Before a forward, when the session knows where it is."""
        self._answers, self._running = [], None
        if self._runs.get(component) != self.session.tracker.runs:
            self._runs[component] = self.session.tracker.runs
            if not self.session.recipe.is_exact():
                other_caches.refuse(self.session.pipe, {component: self.modules[component]})
            self._kinds[component] = self._start_run(component, inputs)
        kinds, at = self._kinds[component], self.session.at
        if not kinds or at is None:
            return
        reason = hindrance.of_call(inputs)
        if reason is not None:
            self._stand_aside(component, kinds, reason)
            return
        if MODULATION in kinds:
            self._answers += self._modulation[component].begin(at, inputs)
        if TEXT_KV in kinds and self.session.active:  # not so in a third call of a step
            self._answers += self._text_kv[component].begin(at, inputs)
        self._running = component

    @torch.compiler.disable(recursive=False)
    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the denoiser's forward while the tables answer.

        The output is not a number where a timestep was not the one foreseen: on a GPU nobody waits for that
        comparison, and a wrong row can make no wrong picture, only none.
        """
        if not self._answers:
            return forward(*args, **kwargs)
        with standing_in(self._answers):
            output = forward(*args, **kwargs)
        tables = self._modulation.get(self._running or "")
        if tables is None or MODULATION not in self._kinds[self._running or ""]:
            return output
        tables.end()
        return output if tables.failed is None else _spoiled(output, tables.failed)

    def finish(self, close: Callable[[], None]) -> None:
        """The run is over: look at the comparisons that nobody waited for, then `close` the session's."""
        try:
            self._look_at_comparisons()
        finally:
            for stored in self._text_kv.values():
                stored.new_run()
            close()

    def _look_at_comparisons(self) -> None:
        for tables in self._modulation.values():
            failed, tables.failed = tables.failed, None
            if failed is not None and bool(failed):
                tables.refused = "not used: a timestep of the last run was not the scheduler's"
                tables.drop()
                self.session.fallback(
                    "modulation tables: a timestep was changed between the scheduler and the denoiser, and "
                    "the output is not a number. Set modulation = false in [exact], or run again without it"
                )

    def remove(self) -> None:
        """Weights back on their device, tables gone."""
        for tables in self._modulation.values():
            tables.drop()
        self._answers = []

    # ---- once per run

    def _start_run(self, component: str, inputs: Mapping[str, Any]) -> set[str]:
        wanted = {name for name, wish in self._wishes.items() if wish is not False}
        module, family = self.modules[component], self.session.families[component]
        if family.modulation is None:
            wanted.discard(MODULATION)
        if not self.session.denoisers[component].cross_attention:
            wanted.discard(TEXT_KV)
        if not wanted:
            return wanted
        compiled = any(hook.compiled is not None for hook in self._block_hooks)
        reason = hindrance.of_model(self.session.pipe, component, module, compiled)
        if reason is not None:
            self._stand_aside(component, wanted, reason)
            return set()
        if MODULATION in wanted and not self._start_modulation(component, module, family):
            wanted.discard(MODULATION)
        if TEXT_KV in wanted and not self._start_text_kv(component, module, family, inputs):
            wanted.discard(TEXT_KV)
        return wanted

    def _start_modulation(self, component: str, module: nn.Module, family: Any) -> bool:
        if component not in self._modulation:
            self._modulation[component] = ModulationTables(self.session, module, family.modulation)
        tables = self._modulation[component]
        reason = tables.refused
        if reason is None and self._wishes[MODULATION] == AUTO:
            reason = gain.too_little_modulation(tables.modules())
        if reason is not None:
            self.session.exact_reasons[MODULATION] = reason
            return False
        stays = hindrance.of_release(module, tables.modules())
        tables.releases = stays is None
        if stays is not None:
            self.session.exact_reasons["weights"] = f"stay where they are: {stays}"
        tables.new_run()
        return True

    def _start_text_kv(
        self, component: str, module: nn.Module, family: Any, inputs: Mapping[str, Any]
    ) -> bool:
        if component not in self._text_kv:
            self._text_kv[component] = TextKV(self.session, component, module, family.text_arguments)
        stored = self._text_kv[component]
        stored.new_run()
        if self._wishes[TEXT_KV] == AUTO and self.session.at is not None:
            reason = gain.too_little_text(stored, module, self.session.at, inputs)
            if reason is not None:
                self.session.exact_reasons[TEXT_KV] = reason
                return False
        return True

    def _stand_aside(self, component: str, kinds: set[str], reason: str) -> None:
        for name in sorted(kinds):
            self.session.exact_reasons[name] = f"stands aside: {reason}"
            if self._wishes[name] is True:
                self.session.fallback(f"exact tables of {name} stand aside: {reason}")
        if component in self._modulation:
            self._modulation[component].drop()


def _spoiled(output: Any, failed: Tensor) -> Any:
    sample = output[0]
    whole = torch.where(
        failed, torch.full((), float("nan"), dtype=sample.dtype, device=sample.device), sample
    )
    return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)
