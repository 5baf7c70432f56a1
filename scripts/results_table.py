"""Write the README's tables and the benches' pictures from docs/results, or add a measured object first.

python scripts/results_table.py                                  rewrite README.md, draw the pictures
python scripts/results_table.py --check                          fail if README.md is not what the lines say
python scripts/results_table.py --append out.json --device NAME  add lines, then rewrite
"""

import argparse
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from dit_accel import results
from dit_accel.bench import pareto

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--append", type=Path, help="what dit-accel compare or bench wrote with --json")
    parser.add_argument("--device", help="file name in docs/results without .jsonl: cpu-2core, h100")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    folder, readme = ROOT / "docs" / "results", ROOT / "README.md"
    if given.append:
        if not given.device:
            parser.error("--append needs --device")
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        date = datetime.now(UTC).date().isoformat()
        measured = json.loads(given.append.read_text(encoding="utf-8"))
        results.append(results.lines_from(measured, commit=commit, date=date), folder, given.device)
    before = readme.read_text(encoding="utf-8")
    lines = results.read(folder)
    after = results.place(before, results.tables(lines))
    if given.check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    pareto.draw_models(lines, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
