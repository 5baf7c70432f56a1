"""How many bytes a run will keep, known from shapes before it keeps any, and the bound a recipe sets."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit_accel.plan import Key, Plan
from dit_accel.session import Forward, Session
from dit_accel.sites import DENOISER
from dit_accel.spans import gates_in_use
from dit_accel.timeline import DIFFERENCE, INPUT, OUT, SHARED, TAIL_LSE, Track

LSE_BYTES = SCALE_BYTES = 4  # float32 in every dtype of the model


def check_memory(session: Session, module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Predict at the first forward of each denoiser and branch of a run; over the bound it runs dense."""
    at = session.at
    if (
        not session.active
        or at is None
        or session.plan is None
        or (at.component, at.branch) in session.predicted
    ):
        return
    session.predicted[at.component, at.branch] = _Predictor(session.plan, at, session, module, inputs).bytes()
    needed = sum(session.predicted.values())
    if session.recipe.memory_gb is not None and needed > session.recipe.memory_gb * 2**30:
        session.forbid_memory(needed)


class _Predictor:
    """The bytes one denoiser keeps on one branch."""

    def __init__(
        self, plan: Plan, at: Forward, session: Session, module: nn.Module, inputs: Mapping[str, Any]
    ):
        self.plan, self.at, self.module, self.inputs = plan, at, module, inputs
        self.family = session.families[at.component]
        self.denoiser = session.denoisers[at.component]
        self.storage = session.recipe.storage
        text = inputs.get("encoder_hidden_states")
        self.text = text.shape[1] if at.joint and isinstance(text, Tensor) else 0
        self.item = next(p for p in module.parameters() if p.is_floating_point()).element_size()
        hidden = inputs["hidden_states"]
        self.item = max(self.item, hidden.element_size()) if isinstance(hidden, Tensor) else self.item

    def bytes(self) -> int:
        heads = sum(self._heads(key, track) for key, track in self._own(self.plan.attention))
        units = sum(self._unit(key, track) for key, track in self._own(self.plan.timeline))
        return heads + units

    def _own(self, tracks: Mapping[Key, Track]) -> list[tuple[Key, Track]]:
        return [(key, track) for key, track in tracks.items() if key[0] == self.at.component]

    def _slots(self, track: Track) -> list[tuple[str, str, tuple[int, ...], int]]:
        """(branch, name, heads, samples) of what is stored while this branch runs."""
        if self.at.branch == "both" and not track.together:
            return [(b, name, heads, self.at.batch // 2) for (b, name), heads in track.slots.items()]
        owner = "cond" if self.at.branch == "both" else self.at.branch
        return [(b, name, heads, self.at.batch) for (b, name), heads in track.slots.items() if b == owner]

    def _heads(self, key: Key, track: Track) -> int:
        """Bytes of what one attention site keeps."""
        width = self._channels(key[1]) // self.denoiser.attention[key[1]]
        joint = key[1] in self.denoiser.self_attention
        total = 0
        for _, name, heads, samples in self._slots(track):
            rows = self.at.visual + (self.text if joint and name not in (SHARED, DIFFERENCE) else 0)
            per_row = LSE_BYTES if name == TAIL_LSE else width * self.item
            total += samples * rows * len(heads) * per_row
        return total

    def _unit(self, key: Key, track: Track) -> int:
        """Bytes of what one span or sublayer keeps."""
        span = self.plan.spans.get(key)
        total = 0
        for branch, name, _, samples in self._slots(track):
            samples *= track.depths[branch, name]
            if key[1] == DENOISER:
                total += samples * self._latents(name)
                continue
            if span is not None:
                gates = gates_in_use(track, branch) if name == OUT else set()
                if "current" in gates:
                    total += samples * sum(self._recorded(block) for block in span.blocks)
                if gates != {"current"}:
                    total += samples * self._streams() * self._row(span.blocks[0])
            else:
                total += samples * self._sublayer_rows(key[1].rpartition(".")[2]) * self._row(key[1])
        return total

    def _latents(self, name: str) -> int:
        """Bytes per sample of the denoiser's input or output."""
        hidden = self.inputs["hidden_states"]
        numel = hidden.numel() // hidden.shape[0]
        head = next((place.module for place in self.family.places if place.back), None)
        if name != INPUT and head is not None:
            numel = self.at.visual * int(self.module.get_submodule(head).out_features)  # pyright: ignore
        rows = numel // hidden.shape[-1]
        return numel + rows * SCALE_BYTES if self.storage == "fp8" else numel * self.item

    def _row(self, path: str) -> int:
        """Bytes of one stored row of a unit."""
        width = self._channels(path)
        return width + SCALE_BYTES if self.storage == "fp8" else width * self.item

    def _streams(self) -> int:
        return self.at.visual + (self.text if len(self.family.streams) > 1 else 0)

    def _recorded(self, block: str) -> int:
        """Bytes per sample of all sublayer outputs of a block."""
        present = [name for name in self.family.sublayers if _has(self.module, f"{block}.{name}")]
        rows = sum(self._sublayer_rows(name) for name in present)
        return rows * self._row(block)

    def _sublayer_rows(self, name: str) -> int:
        tokens = self.family.sublayer_tokens.get(name, "visual")
        return {"visual": self.at.visual, "text": self.text, "all": self.at.visual + self.text}[tokens]

    def _channels(self, path: str) -> int:
        """Model width: what every output projection of the block writes."""
        block = path if path.count(".") == 1 else path.rsplit(".", 1)[0]
        attention = self.module.get_submodule(f"{block}.{self.family.self_attention[0]}")
        return int(math.prod(attention.to_out[0].weight.shape[:1]))  # pyright: ignore


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False
