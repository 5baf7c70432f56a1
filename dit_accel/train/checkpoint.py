"""The state of a training in one file that appears whole or not at all; safetensors, no pickle.

`state.safetensors` holds all that going on needs: "weights/NAME", "average/NAME", "optimizer/NAME", and as
metadata the steps that are done, the rate, and the sums of the log. It is written last: what lies beside it
for others to load (`weights.safetensors`, `average.safetensors`) is of the same step or of the step that will
be done again.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_accel.errors import BadUsage

STATE, WEIGHTS, AVERAGE = "state.safetensors", "weights.safetensors", "average.safetensors"


@dataclass(frozen=True)
class State:
    """A training after `done` steps. Tensors by name; `sums` are what the log has not written yet."""

    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    done: int
    lr: float
    sums: Mapping[str, float]


def save(folder: Path, state: State, before: Callable[[], None] | None = None) -> None:
    """Writes a checkpoint to `folder`; `before` runs first: what it leaves is there if the state is."""
    folder.mkdir(parents=True, exist_ok=True)
    if before is not None:
        before()
    parts = {"weights": state.weights, "average": state.average, "optimizer": state.optimizer}
    tensors = {
        f"{part}/{name}": value.contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    for part, file in (("weights/", WEIGHTS), ("average/", AVERAGE)):
        own = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        _write_whole(folder / file, own)
    told = {"done": str(state.done), "lr": repr(state.lr), "sums": json.dumps(dict(state.sums))}
    _write_whole(folder / STATE, tensors, told)


def load(folder: Path, module: nn.Module) -> State | None:
    """The state in `folder`, None where there is none; BadUsage if it is none, or that of another module."""
    file = folder / STATE
    if not file.exists():
        return None
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is no dict
                part, _, name = key.partition("/")
                parts[part][name] = opened.get_tensor(key)
            told = opened.metadata()
        done, lr, sums = int(told["done"]), float(told["lr"]), json.loads(told.get("sums", "{}"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BadUsage(
            f"asked to go on with {file}; it is not the state of a training ({error}). Remove it, or give "
            "another folder."
        ) from error
    _check_names(file, parts["weights"], module)
    return State(parts["weights"], parts["average"], parts["optimizer"], done, lr, sums)


def _check_names(file: Path, found: Mapping[str, Tensor], module: nn.Module) -> None:
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    have = {name: tuple(value.shape) for name, value in found.items()}
    odd = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    if odd:
        name = odd[0]
        raise BadUsage(
            f"asked to go on with {file}; {len(odd)} weights do not fit: {name} is "
            f"{wanted.get(name, 'absent')} in the module and {have.get(name, 'absent')} in the file. "
            "Give another folder."
        )


def _write_whole(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())  # a power cut must not leave the name of a file whose bytes never came
    temporary.replace(file)
