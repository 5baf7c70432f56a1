"""What a search has asked for and measured, in the folder of its training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import BadUsage
from dit_accel.recipe_files import write_whole


class Kept:
    """`asked.json` and `kept.json`. Raises BadUsage where the folder is of another training."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]):
        file, wanted = folder / "asked.json", json.loads(json.dumps(asked))
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else wanted
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                raise BadUsage(
                    f"asked to train routers with {key} {wanted.get(key)}; {folder} is of a training "
                    f"with {key} {found.get(key)}. Give another --out or --name, or remove the folder."
                )
        write_whole(file, json.dumps(wanted))
        self.file = folder / "kept.json"
        self.values: dict[str, Any] = {}
        if self.file.is_file():
            self.values = json.loads(self.file.read_text(encoding="utf-8"))

    def keep(self, name: str, value: Any) -> None:
        """Remember something measured: a search that goes on does not measure it again."""
        self.values[name] = value
        write_whole(self.file, json.dumps(self.values))
