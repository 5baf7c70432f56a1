"""What a search has decided and measured, in a file that outlives an interruption.

Decisions are letters and numbers, no tensors: a search that goes on replays the decided steps, which gives
the same latents again, and decides the rest as it would have. The file appears whole or not at all.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.errors import BadUsage
from dit_accel.recipe_files import write_whole

EVERY = 2.0  # seconds between two writes at least; what is lost is decided again
SHARE = 30.0  # and so many times what a write takes


class Saved:
    """The state file of one search, whose decisions are of `kind`.

    `asked` says what is searched: a file of another search is refused.
    """

    def __init__(self, file: Path, asked: Mapping[str, Any], kind: Callable[..., Any]):
        self.file, self.asked, self.kind = file, json.loads(json.dumps(asked)), kind
        self.searches: dict[str, Any] = {}
        self.measured: dict[str, dict[str, float]] = {}
        self._next = 0.0  # when a write is due
        if file.is_file():
            self._read()

    def decisions(self, delta: float) -> Any:
        """What is decided at this delta, to be filled."""
        return self.searches.setdefault(repr(delta), self.kind())

    def save(self, now: bool = True) -> None:
        """Write the file; not `now`: unless it was written a moment ago."""
        began = time.monotonic()
        if not now and began < self._next:
            return
        searches = {delta: decisions.as_dict() for delta, decisions in self.searches.items()}
        state = {"schema": 1, "asked": self.asked, "searches": searches, "measured": self.measured}
        write_whole(self.file, json.dumps(state))
        took = time.monotonic() - began  # the errors of many heads are a large file
        self._next = began + max(EVERY, SHARE * took)

    def _read(self) -> None:
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            found = dict(state["asked"])
            self.searches = {delta: self.kind(**each) for delta, each in state["searches"].items()}
            self.measured = dict(state["measured"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadUsage(
                f"asked to go on with {self.file}; it is not the state of a search ({error}). Remove it."
            ) from error
        refuse_another(self.file, found, self.asked)


def refuse_another(file: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise BadUsage where a state file is of a search for something else."""
    for key in {**found, **asked}:
        if found.get(key) != asked.get(key):
            raise BadUsage(
                f"asked to search with {key} {asked.get(key)}; {file} is the state of a search "
                f"with {key} {found.get(key)}. Give another --out or --name, or remove the file."
            )


def digest_of(modules: Mapping[str, nn.Module]) -> str:
    """A short digest of a model's weights: the same name may come to mean other weights."""
    digest = hashlib.sha256()
    for module in modules.values():
        for name, parameter in module.named_parameters():
            head = parameter.detach().flatten()[:64].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]
