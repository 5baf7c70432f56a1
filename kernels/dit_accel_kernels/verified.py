"""Which kernels have been found right on a real GPU: the record that lets `auto` choose them.

`verified.json` maps `<op>.<backend>` to lines {arch, sources, device, date, commit, checks}. A line holds for
one architecture and one hash of all that decides the numbers, so a changed source is unverified again.
`scripts/gpu_suite.py` writes it when every check of the backend's slice has passed on the device.
"""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("verified.json")


def why_unverified(kernel: str, arch: str, sources: str, file: Path | None = None) -> str | None:
    """The reason why nobody may choose this kernel for a user, or None where a line vouches for it."""
    lines = _lines(file or FILE).get(kernel, [])
    if any(line["arch"] == arch and line["sources"] == sources for line in lines):
        return None
    older = any(line["arch"] == arch for line in lines)
    since = "its sources have changed since they were" if older else "it has not run there"
    return f"its numbers are not verified on a GPU of {arch}: {since}"


def record(kernel: str, line: dict[str, Any], file: Path | None = None) -> None:
    """Add a line, in place of an older one of its architecture and device."""
    file = file or FILE
    known = dict(_lines(file))
    same = ("arch", "device")
    others = [each for each in known.get(kernel, []) if any(each[key] != line[key] for key in same)]
    known[kernel] = [*others, line]
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _lines.cache_clear()


@functools.cache
def _lines(file: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
