"""What a training tells: a JSON line every so many steps in log.jsonl."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.recipe_files import write_whole

Numbers = dict[str, float]

LOG = "log.jsonl"


class Log:
    """The log in `folder`, a line every `every` steps; `sums` is what the next line has so far."""

    def __init__(self, folder: Path, every: int):
        self.file, self.every = folder / LOG, every
        self.sums: Numbers = {}
        self.began = time.perf_counter()

    def resume(self, done: int, sums: Mapping[str, float], lead: bool) -> None:
        """Goes on after `done` steps; `lead` drops the lines of steps that will be taken again."""
        lines = [line for line in read(self.file) if line["step"] <= done]
        if lead and self.file.exists():
            write_whole(self.file, "".join(f"{json.dumps(line)}\n" for line in lines))
        self.began -= lines[-1]["seconds"] if lines else 0.0
        self.sums = dict(sums)

    def add(self, numbers: Numbers) -> None:
        """The numbers of one step."""
        for key, value in numbers.items():
            self.sums[key] = self.sums.get(key, 0.0) + value / self.every

    def take(self) -> Numbers:
        """The means since the last line; a new line begins."""
        numbers, self.sums = self.sums, {}
        return numbers

    def write(self, done: int, numbers: Numbers) -> None:
        """The line after `done` steps; `seconds` counts on over interruptions."""
        head = {"step": done, "seconds": round(time.perf_counter() - self.began, 1)}
        line = head | {key: round(value, 5) for key, value in numbers.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that an interruption left unfinished is none."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
