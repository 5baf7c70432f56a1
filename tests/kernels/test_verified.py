"""The record that lets `auto` choose a kernel: a line vouches for one architecture and its sources."""

import json

import pytest

from dit_accel_kernels import verified
from dit_accel_kernels.block_attention import cuda, cuda_builds

NAME = "block_attention.cuda"
LINE = {"arch": "sm_90", "sources": "a", "device": "H200", "date": "2026-11-23", "commit": "c", "checks": 3}


@pytest.fixture
def file(tmp_path):
    verified.record(NAME, LINE, tmp_path / "verified.json")
    return tmp_path / "verified.json"


def test_a_line_vouches_for_its_architecture_and_sources_only(file):
    assert verified.why_unverified(NAME, "sm_90", "a", file) is None
    said = "its numbers are not verified on a GPU of"
    changed = verified.why_unverified(NAME, "sm_90", "b", file)
    assert changed == f"{said} sm_90: its sources have changed since they were"
    assert verified.why_unverified(NAME, "sm_100", "a", file) == f"{said} sm_100: it has not run there"
    assert verified.why_unverified("other.cuda", "sm_90", "a", file) is not None


def test_a_new_line_replaces_that_of_its_device(file):
    verified.record(NAME, LINE | {"sources": "b"}, file)
    verified.record(NAME, LINE | {"sources": "b", "device": "H100"}, file)
    lines = json.loads(file.read_text())[NAME]
    assert [(line["device"], line["sources"]) for line in lines] == [("H200", "b"), ("H100", "b")]
    assert verified.why_unverified(NAME, "sm_90", "a", file) is not None


def test_what_is_committed_has_every_key():
    for lines in json.loads(verified.FILE.read_text()).values():
        assert all(set(line) >= set(LINE) for line in lines)


@pytest.mark.parametrize("part", ["SOURCE", "HOST", "FLAGS", "STAGES"])
def test_whatever_decides_the_numbers_is_in_their_hash(part, monkeypatch, tmp_path):
    before = cuda_builds.numerics_hash()
    other = tmp_path / "other"
    other.write_text("changed")
    values = {"SOURCE": other, "HOST": other, "FLAGS": ("-O0",), "STAGES": {64: 2, 128: 2}}
    monkeypatch.setattr(cuda_builds, part, values[part])
    assert cuda_builds.numerics_hash() != before


def test_auto_asks_the_record_and_an_explicit_request_does_not(file, monkeypatch):
    monkeypatch.setattr(cuda, "_no_device", lambda: None)
    monkeypatch.setattr(cuda, "_why_not_tensors", lambda **tensors: None)
    monkeypatch.setattr(cuda, "_why_not_loaded", lambda q: None)
    monkeypatch.setattr(verified, "FILE", file)
    assert cuda.why_not(q=None) is None
    assert "sources have changed" in (cuda.why_not_auto(q=None) or "")
    verified.record(NAME, LINE | {"sources": cuda_builds.numerics_hash()}, file)
    assert cuda.why_not_auto(q=None) is None
