#!/usr/bin/env bash
# Build the wheel, install it alone in an empty environment, and run the demo from an empty folder outside the checkout.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip "$@" -qq --disable-pip-version-check; }

rm -rf "$root/build"  # setuptools would pack whatever an earlier build left there
pip wheel --no-deps -w "$work/dist" "$root"
rm -rf "$root/build"
wheel=$(ls "$work"/dist/*.whl)
echo "wheel: $(basename "$wheel"), $(du -k "$wheel" | cut -f1) KiB"
[[ $wheel == *-py3-none-any.whl ]] || { echo "the wheel is not pure Python"; exit 1; }

"$work/env/bin/python" - "$wheel" "$root" <<'PY'
import sys, zipfile
from pathlib import Path

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
root = Path(sys.argv[2])
tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
assert tops == {"dit_accel", "dit_accel_kernels"}, f"the wheel installs {tops}"
sources = [*root.glob("dit_accel/**/*.py"), *root.glob("kernels/dit_accel_kernels/**/*")]
wanted = {str(p.relative_to(root)).removeprefix("kernels/") for p in sources if p.is_file()}
wanted |= {f"dit_accel/{p.relative_to(root)}" for p in root.glob("recipes/**/*.toml")}
toys = root / "pipelines" / "toys"
wanted |= {f"dit_accel/toys/{p.relative_to(toys)}" for p in toys.rglob("*") if p.suffix in {".json", ".safetensors", ".txt"}}
missing = sorted(name for name in wanted - names if "__pycache__" not in name)
assert not missing, f"not in the wheel: {missing}"
print(f"wheel: {len(names)} files, every source, recipe and toy among them")
PY

pip install --no-compile -c "$root/constraints.txt" "$wheel"
mkdir "$work/empty" && cd "$work/empty"
env -u PYTHONPATH "$work/env/bin/dit-accel" demo "$@"
echo "wheel: the demo ran from an empty folder and left:" && find . -type f | sort | head -40
