"""Kernels compiled ahead of time: what a budget refuses, by name; and that the attention kernel compiles."""

import importlib.util
import os
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from dit_accel_kernels.ahead import Build, Measured, complaints, line_of, measure, read_budget, write_budget
from dit_accel_kernels.block_attention import triton_configs
from dit_accel_kernels.block_attention.triton_builds import build, builds
from dit_accel_kernels.history_mix import triton_builds as mix_builds

BUILD = Build("sm_90 attend", None, 90, {}, {}, 8, 2, hot=True, needs=("HGMMA", "UTMALDG"))
GOOD = Measured(registers=200, stack=0, shared=100_000, opcodes={"HGMMA": 8, "UTMALDG": 5})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"registers": 201}, ["sm_90 attend: registers 201, budget 200"]),
        ({"shared": 100_001}, ["sm_90 attend: shared 100001, budget 100000"]),
        ({"opcodes": {"HGMMA": 8}}, ["sm_90 attend: no UTMALDG; it has {'HGMMA': 8}"]),
        (
            {"stack": 8},
            [
                "sm_90 attend: stack 8, budget 0",
                "sm_90 attend: hot, but stack 8 B and 0 spill instructions",
            ],
        ),
    ],
    ids=["good", "registers", "shared", "opcode", "stack"],
)
def test_what_is_over_the_budget_is_named_with_both_numbers(change: dict, said: list[str]):
    budget = {BUILD.name: line_of(GOOD)}
    assert list(complaints(BUILD, replace(GOOD, **change), budget)) == said


def test_no_budget_allows_a_spill_in_a_hot_build_or_more_memory_than_there_is():
    spilled = replace(GOOD, opcodes=GOOD.opcodes | {"LDL": 2, "STL": 1}, shared=(227 << 10) + 1)
    said = list(complaints(BUILD, spilled, {BUILD.name: line_of(spilled)}))
    assert said == [
        "sm_90 attend: hot, but stack 0 B and 3 spill instructions",
        "sm_90 attend: shared 232449 B, sm_90 has 232448 B",
    ]


def test_a_build_without_a_line_is_a_complaint():
    assert list(complaints(BUILD, GOOD, {})) == ["sm_90 attend: no line in the budget"]


def test_a_budget_reads_back_as_it_was_written(tmp_path):
    write_budget(tmp_path, [(BUILD.name, line_of(GOOD))])
    assert read_budget(tmp_path) == {BUILD.name: line_of(GOOD)}


def test_every_device_width_and_block_has_a_config_and_every_build_a_name():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for width in (32, 64, 72, 96, 128):
            for bits, block in ((16, 64), (16, 128), (32, 64), (32, 128)):
                config = triton_configs.config_for(capability, width, bits, block)
                assert not (config.descriptors and capability[0] not in (9, 10))
    names = [each.name for each in (*builds(), *mix_builds.builds())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("arch", "width"), [(80, 64), (90, 128)])
def test_the_attention_kernel_compiles_without_spills(arch: int, width: int):
    each = build(arch, width)
    measured = measure(each)
    assert not list(complaints(each, measured, {each.name: line_of(measured)})), measured


@pytest.mark.parametrize("case", ["bf16 forecast of 2, gated", "bf16 forecast of 2 in fp8, gated"])
def test_the_mix_of_a_history_compiles_to_wide_loads_on_the_oldest_device(case: str):
    each = mix_builds.build(80, case)
    measured = measure(each)
    assert not list(complaints(each, measured, {each.name: line_of(measured)})), measured
