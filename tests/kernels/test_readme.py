"""kernels/README.md: each row is of a backend that exists, and names tests that exist."""

import re
from pathlib import Path

from dit_accel_kernels.dispatch import backends

ROOT = Path(__file__).parent.parent.parent
ROWS = re.findall(
    r"^\| `(\w+)` \| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "kernels" / "README.md").read_text(), re.MULTILINE
)
OPS = sorted(path.parent.name for path in (ROOT / "kernels" / "dit_accel_kernels").glob("*/reference.py"))
NO_ROW = {("block_attention", "cuda")}  # no test covers it: no GPU has run it, as the text says


def test_every_backend_of_every_op_has_one_row():
    found = sorted((op, backend) for op, backend, _ in ROWS)
    assert found == sorted({(op, backend) for op in OPS for backend in backends(op)} - NO_ROW)


def test_every_row_names_tests_that_exist_and_are_about_the_op():
    for op, backend, cell in ROWS:
        names = re.findall(r"(test_\w+\.py)", cell)
        assert names, (op, backend)
        for name in names:
            text = (ROOT / "tests" / "kernels" / name).read_text()
            assert op in text or name == "test_masks.py", (op, name)
