"""Lines of docs/results: made from what `compare` and `bench` measured, read back as the README's tables.

A line is one JSON object, see docs/results/README.md. Nothing here measures.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit_accel.errors import DitAccelError

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SHAPE = {"height": "height", "width": "width", "num_frames": "frames", "num_inference_steps": "steps"}
HEAD = (
    "what ran", "seconds", "dense beside it", "speedup", "PSNR dB", "SSIM", "fits its prompt", "peak GiB",
    "attention kept", "minutes of search"
)  # fmt: skip
SHARED = ("model", "versions", "device", "shape", "dtype", "seeds", "interleaved", "attention")
QUALITY = ("psnr", "ssim", "faithfulness")
BESIDES = ("attention_kept", "search_minutes", "kernel_alone")  # of the recipe's line
PICTURES = "docs/results"
NOTHING = "No result has been recorded yet."
DENSE = "dense"

Line = dict[str, Any]


class Group(NamedTuple):
    """What a table is of."""

    device: str
    model: str
    shape: str
    in_turn: bool  # one `bench`: its rows may be compared with each other

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.model} on {self.device}" + (f": {self.shape}" if self.shape else "")


def lines_from(measured: Mapping[str, Any], **known: Any) -> list[Line]:
    """The lines of one `compare --json` or `bench --json` object; `known` (commit, date) goes into each."""
    if "rows" in measured:
        shared = {key: measured[key] for key in SHARED if key in measured}
        rows = [_known(row) for row in measured["rows"]]
    elif "columns" in measured:
        shared = _shared(measured)
        rows = [_row(measured, key) for key in measured["columns"]]
    else:
        raise DitAccelError(
            f"asked to record a result; the object has the keys {', '.join(measured) or 'none'}. "
            "Give what `dit-accel compare --json` or `dit-accel bench --json` wrote."
        )
    return [{"what": "pipeline", **shared, **row, **known} for row in rows]


def append(lines: Iterable[Line], folder: Path, device: str) -> Path:
    """Add lines to the device's file."""
    file = folder / f"{device}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(line, allow_nan=False, sort_keys=True) + "\n" for line in lines)
    return file


def read(folder: Path) -> list[Line]:
    """Every line of every device, in file order."""
    lines: list[Line] = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise DitAccelError(
                    f"{file}:{number}: not a JSON object ({error}); mend or remove it"
                ) from error
    return lines


def tables(lines: Sequence[Line]) -> str:
    """Markdown: one table for each device, model and shape, holding the newest line of each name.

    What `bench` measured in turn has a table of its own, and a picture.
    """
    parts = [_table(group, rows) for group, rows in groups(lines).items()]
    return "\n\n".join(parts) or NOTHING


def groups(lines: Iterable[Line]) -> dict[Group, list[Line]]:
    """The newest line of each name, by device, model, shape and whether many rows were measured in turn."""
    found: dict[Group, dict[str, Line]] = {}
    for line in lines:
        if line["what"] == "pipeline":
            group = Group(line["device"], line["model"], _shape(line), "interleaved" in line)
            found.setdefault(group, {})[line["name"]] = line
    return {group: list(rows.values()) for group, rows in found.items()}


def picture_of(model: str) -> str:
    """File name of the picture of a model's benches, in docs/results."""
    return f"pareto_{model.strip('./').replace('/', '-')}.png"


def place(text: str, table: str) -> str:
    """`text` with `table` between its two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DitAccelError(
            f"asked to write the results table; the text lacks {BEGIN} or {END}. Put both in."
        )
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def shape_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a line from a call's arguments."""
    return {ours: arguments[theirs] for theirs, ours in SHAPE.items() if theirs in arguments}


def _shared(compared: Mapping[str, Any]) -> Line:
    arguments, jobs = compared["arguments"], compared["jobs"]
    return {
        "model": compared["model"],
        "shape": shape_of(arguments),
        "runs": len(jobs),
        "seeds": sorted({job["seed"] for job in jobs}),
        "versions": compared["versions"],
        "device": compared["device"],
    }


def _row(compared: Mapping[str, Any], key: str) -> Line:
    column = compared["columns"][key]
    names = {DENSE: DENSE, "recipe": f"dit_accel:{compared['recipe']}"}
    row: Line = {"name": names.get(key, f"steps:{column['steps']}"), "seconds": column["seconds"]}
    row |= {
        name: column[name] for name in ("speedup", *QUALITY, "peak_bytes") if column.get(name) is not None
    }
    if key == "recipe":
        row["counters"] = compared["counters"]
        row |= {name: compared[name] for name in BESIDES if compared.get(name) is not None}
    return row


def _shape(line: Line) -> str:
    shape = line.get("shape", {})
    size = f"{shape['width']} x {shape['height']}" if "width" in shape and "height" in shape else ""
    counts = (f"{shape[name]} {name}" for name in ("frames", "steps") if name in shape)
    op = "attention through our op everywhere" if line.get("attention") == "op" else ""
    parts = (size, *counts, line.get("dtype", ""), op)
    return ", ".join(part for part in parts if part)


def _known(row: Mapping[str, Any]) -> Line:
    """A row without what it does not have."""
    return {key: value for key, value in row.items() if value is not None}


def _table(group: Group, rows: Sequence[Line]) -> str:
    runs, commits, dates = (
        " or ".join(str(value) for value in sorted({row[key] for row in rows if key in row}))
        for key in ("runs", "commit", "date")
    )
    turn = "all in turn" if group.in_turn else ""
    facts = ((f"medians of {runs} runs", runs), (turn, turn), (f"commit {commits}", commits), (dates, dates))
    made = ", ".join(text for text, known in facts if known)
    title = f"**{group.model}**{group.title.removeprefix(group.model)}" + (f" ({made})" if made else "")
    if group.in_turn:
        title += f"\n\n![speed and nearness to dense]({PICTURES}/{picture_of(group.model)})"
        rows = sorted(rows, key=lambda row: row.get("speedup") or 0)
    lines = [HEAD, ("---", *("---:",) * (len(HEAD) - 1)), *map(_cells, rows)]
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _cells(row: Line) -> tuple[str, ...]:
    if row.get("error"):
        return (row["name"], "failed", *("",) * (len(HEAD) - 2))
    reference = row["name"] == DENSE  # itself: PSNR and SSIM to itself say nothing
    peak = row.get("peak_bytes")
    unpaired = (
        reference or "speedup" not in row
    )  # a machine's speed drifts: a speedup is of the runs beside it
    return (
        row["name"] + (" (changed nothing)" if row.get("changed_nothing") else ""),
        _number(row.get("seconds"), 2),
        "" if unpaired else _number(row["seconds"] * row["speedup"], 2),
        _number(row.get("speedup"), 2),
        "" if reference else _number(row.get("psnr"), 1),
        "" if reference else _number(row.get("ssim"), 3),
        _number(row.get("faithfulness"), 3),
        _number(None if peak is None else peak / 2**30, 2),
        _number(row.get("attention_kept"), 2),
        _number(row.get("search_minutes"), 1),
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
