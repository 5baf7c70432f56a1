"""Compile every Triton kernel for devices that are not here, and compare it with its committed budget.

python scripts/compile_kernels.py                 every build; exit status 1 where one is over its budget
python scripts/compile_kernels.py "sm_90 D=128"   those whose names contain this
python scripts/compile_kernels.py --write         what came out is the new budget of the installed Triton;
                                                  with a part of names, of these builds
python scripts/compile_kernels.py --search 90 128 candidate tiles of attention for one device and head width
"""

import argparse
import itertools
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import triton

from dit_accel_kernels import ahead
from dit_accel_kernels.block_attention import triton_builds as attention_builds
from dit_accel_kernels.block_attention.triton_configs import Config
from dit_accel_kernels.history_mix import triton_builds as mix_builds

BUDGETS = Path(__file__).parent.parent / "kernels" / "budget"
CANDIDATES = [*itertools.product((32, 64, 128), (4, 8), (1, 2, 3), (False, True))]


def builds() -> list[ahead.Build]:
    """Every build of every op."""
    return [*attention_builds.builds(), *mix_builds.builds()]


def measured_by_name(name: str) -> tuple[str, ahead.Measured]:
    """One build in a process of its own: builds hold what cannot be sent to one."""
    return name, ahead.measure(next(each for each in builds() if each.name == name))


def search(arch: int, width: int) -> None:
    """Print what each candidate compiles to: few registers, no stack, no spills is what to choose from."""
    for candidate in CANDIDATES:
        config = Config(*candidate)
        if config.descriptors and arch < 90:
            continue
        start = time.perf_counter()
        try:
            measured = ahead.measure(attention_builds.build(arch, width, config=config))
        except Exception as error:  # a candidate may be more than the compiler can do
            print(config, type(error).__name__, str(error)[:100], flush=True)
            continue
        shared = "" if measured.shared <= ahead.SHARED_LIMIT[arch] else " TOO MUCH SHARED"
        print(config, measured, f"{time.perf_counter() - start:.1f} s{shared}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="of the names of builds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--search", nargs=2, type=int, metavar=("ARCH", "WIDTH"))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.search:
        search(*given.search)
        return 0
    known = {each.name: each for each in builds() if given.part in each.name}
    with ProcessPoolExecutor(given.processes) as pool:
        measured = {}
        for name, each in pool.map(partial(measured_by_name), known):
            measured[name] = each
            print(f"{name}: {each}", flush=True)
    if given.write:
        others = ahead.read_budget(BUDGETS) if given.part and ahead.budget_file(BUDGETS).is_file() else {}
        lines = others | {name: ahead.line_of(each) for name, each in measured.items()}
        ahead.write_budget(BUDGETS, lines.items())
        wrong = [text for name, each in measured.items() for text in ahead.rules(known[name], each)]
    elif not ahead.budget_file(BUDGETS).is_file():
        wrong = [f"there is no {ahead.budget_file(BUDGETS).name} in {BUDGETS}: --write makes it of these"]
    else:
        budget = ahead.read_budget(BUDGETS)
        wrong = [
            text for name, each in measured.items() for text in ahead.complaints(known[name], each, budget)
        ]
    print("\n".join([f"{len(measured)} builds with Triton {triton.__version__}", *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
