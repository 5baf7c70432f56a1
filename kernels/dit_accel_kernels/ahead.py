"""Compile Triton kernels for devices that are not here, and hold registers, spills and opcodes to a budget.

Triton needs no driver for this; the disassembler comes in its wheel. A budget belongs to one version of
Triton, because every version allocates registers anew.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of one program
SPILLS = ("LDL", "STL")
OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG.E.128", "MUFU.EX2", *SPILLS)
Type = str | tuple["Type", ...]


@dataclass(frozen=True)
class Build:
    """One kernel compiled in one way."""

    name: str  # the line of the budget
    kernel: Any  # what triton.jit made
    arch: int  # 90 for sm_90
    types: dict[
        str, Type
    ]  # of arguments, as in "*bf16", "i32", "tensordesc<bf16[1, 64, 1, 64]>", or tuples of them
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    hot: bool  # may not spill
    needs: tuple[str, ...]  # opcodes that must appear: without them the compiler took a slow way


@dataclass(frozen=True)
class Measured:
    """What the compiler made of a build."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes
    opcodes: dict[str, int]

    @property
    def spills(self) -> int:
        """Instructions that move registers to memory and back."""
        return sum(self.opcodes.get(name, 0) for name in SPILLS)


def measure(build: Build) -> Measured:
    """Compile one build and read its machine code."""
    names = build.kernel.arg_names
    types = {n: "constexpr" if n in build.constants else build.types[n] for n in names}
    places = [place for i, n in enumerate(names) for place in _places((i,), types[n])]
    constants = {place: build.constants.get(names[place[0]]) for place, kind in places if kind == "constexpr"}
    # what a launch finds out about aligned pointers and strides
    aligned = {at: [["tt.divisibility", 16]] for at, kind in places if _is_aligned(names[at[0]], kind)}
    source = ASTSource(fn=build.kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)
    return read(compiled.asm["cubin"], compiled.metadata.shared)


def _places(at: tuple[int, ...], kind: Type) -> Iterator[tuple[tuple[int, ...], str]]:
    """An argument's place and type; of a tuple those of its parts. A part that is constant is None."""
    if isinstance(kind, str):
        yield at, kind
        return
    for i, part in enumerate(kind):
        yield from _places((*at, i), part)


def _is_aligned(name: str, kind: str) -> bool:
    stride = re.fullmatch(r"[a-z]+_([a-z]|steps)|width", name)  # q_n, y_steps; a width decides what is masked
    return kind.startswith("*") or (kind == "i32" and stride is not None)


def read(cubin: bytes, shared: int) -> Measured:
    """Registers, stack and opcodes of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None or not code:
        raise RuntimeError(f"the tools in {tools} did not read the compiled kernel: {usage[-200:]}")
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in OPCODES}
    return Measured(
        int(found[1]), int(found[2]), shared, {name: count for name, count in counts.items() if count}
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def complaints(build: Build, measured: Measured, budget: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What a build has over its budget, each with its name and both numbers."""
    if build.name not in budget:
        yield f"{build.name}: no line in the budget"
        return
    line = budget[build.name]
    for key in ("registers", "stack", "shared", "spills"):
        if getattr(measured, key) > line[key]:
            yield f"{build.name}: {key} {getattr(measured, key)}, budget {line[key]}"
    yield from rules(build, measured)


def rules(build: Build, measured: Measured) -> Iterator[str]:
    """What no budget may allow."""
    if build.hot and (measured.stack or measured.spills):
        yield f"{build.name}: hot, but stack {measured.stack} B and {measured.spills} spill instructions"
    if measured.shared > SHARED_LIMIT[build.arch]:
        yield f"{build.name}: shared {measured.shared} B, sm_{build.arch} has {SHARED_LIMIT[build.arch]} B"
    for opcode in build.needs:
        if not measured.opcodes.get(opcode):
            yield f"{build.name}: no {opcode}; it has {measured.opcodes}"


def line_of(measured: Measured) -> dict[str, Any]:
    """A line of the budget file."""
    return asdict(measured) | {"spills": measured.spills}


def budget_file(folder: Path) -> Path:
    """The budget of the installed Triton."""
    return folder / f"triton-{triton.__version__}.json"


def read_budget(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a build -> its limits. Raises FileNotFoundError where this Triton has none."""
    return json.loads(budget_file(folder).read_text(encoding="utf-8"))


def write_budget(folder: Path, lines: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Replace the budget of the installed Triton."""
    text = ",\n".join(f'  "{name}": {json.dumps(line)}' for name, line in sorted(lines))
    budget_file(folder).parent.mkdir(exist_ok=True)
    budget_file(folder).write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
