"""What a plan search has measured, in a safetensors file that outlives an interruption.

Every finished measurement is written at once, so a search that goes on repeats none. The file appears whole
or not at all, and one of another search is refused.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dit_accel.errors import BadUsage
from dit_accel.recipe_files import write_whole
from dit_accel.search.saved import refuse_another

Arrays = dict[str, np.ndarray]


class State:
    """Named groups of arrays. `asked` says what is searched."""

    def __init__(self, file: Path, asked: Mapping[str, Any]):
        self.file, self.asked = file, json.loads(json.dumps(asked))
        self.groups: dict[str, Arrays] = {}
        if file.is_file():
            self._read()

    def once(self, group: str, measure: Callable[[], Arrays]) -> Arrays:
        """The arrays of a group: those of the file, or else measured now and written."""
        if group not in self.groups:
            self.groups[group] = measure()
            self.save()
        return self.groups[group]

    def save(self) -> None:
        """Write the file."""
        arrays = {
            f"{group}|{name}": np.ascontiguousarray(x)
            for group, of in self.groups.items()
            for name, x in of.items()
        }
        write_whole(self.file, save(arrays, {"schema": "1", "asked": json.dumps(self.asked)}))

    def _read(self) -> None:
        try:
            with safe_open(self.file, "np") as opened:
                found = json.loads((opened.metadata() or {})["asked"])
                for key in opened.keys():  # noqa: SIM118 - safe_open is no dict
                    group, _, name = key.partition("|")
                    self.groups.setdefault(group, {})[name] = opened.get_tensor(key)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BadUsage(
                f"asked to go on with {self.file}; it is not the state of a search ({error}). Remove it."
            ) from error
        refuse_another(self.file, found, self.asked)
