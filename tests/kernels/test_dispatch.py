"""Which backend runs, and what is said when one cannot."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from dit_accel_kernels import dispatch
from dit_accel_kernels.masked_attention import reference


@pytest.fixture
def slow_gpu(monkeypatch):
    """An op whose fast backend refuses; its own reasons must not stay in the caches."""
    fast = SimpleNamespace(why_not=lambda **tensors: "there is no GPU", masked_attention=None)
    monkeypatch.setattr(dispatch, "backends", lambda op: ("cuda", "reference"))
    monkeypatch.setattr(dispatch, "_load", lambda op, name: fast if name == "cuda" else reference)
    dispatch._say_once.cache_clear()
    yield
    dispatch._say_once.cache_clear()


def test_backends_are_found_by_file_name():
    assert "reference" in dispatch.backends("masked_attention")


def test_auto_takes_the_first_backend_that_can(slow_gpu):
    assert dispatch.select("masked_attention") is reference.masked_attention


def test_auto_says_once_why_a_faster_backend_was_passed_over(slow_gpu, caplog):
    with caplog.at_level(logging.INFO, logger="dit_accel_kernels"):
        dispatch.select("masked_attention")
        dispatch.select("masked_attention")

    assert [record.getMessage() for record in caplog.records] == [
        "masked_attention: backend cuda is passed over: there is no GPU"
    ]


def test_an_explicit_backend_runs_or_raises(slow_gpu):
    with pytest.raises(
        dispatch.BackendUnavailable, match='"cuda" was asked for and cannot run: there is no GPU'
    ):
        dispatch.select("masked_attention", "cuda")


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(dispatch.BackendUnavailable, match=r'no backend "metal", only .*reference'):
        dispatch.select("masked_attention", "metal")


def test_the_environment_chooses_for_auto_only(slow_gpu, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_BACKEND", "cuda")

    with pytest.raises(dispatch.BackendUnavailable, match="there is no GPU"):
        dispatch.select("masked_attention", "auto")
    assert dispatch.select("masked_attention", "reference") is reference.masked_attention


def test_a_failed_import_is_the_reason(monkeypatch):
    def broken(name):
        raise ImportError("libcuda.so is missing")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    monkeypatch.setattr(dispatch, "_load", dispatch._load.__wrapped__)

    assert dispatch.why_not("masked_attention", "reference") == "it cannot be imported: libcuda.so is missing"


def test_auto_passes_over_what_may_only_be_asked_for(slow_gpu, monkeypatch):
    """A backend that can run, and whose numbers nobody has verified."""
    monkeypatch.setattr(dispatch, "_load", lambda op, name: unverified if name == "cuda" else reference)
    run = lambda: None  # noqa: E731
    unverified = SimpleNamespace(
        why_not=lambda **tensors: None, why_not_auto=lambda **tensors: "not verified", masked_attention=run
    )
    assert dispatch.select("masked_attention") is reference.masked_attention
    assert dispatch.select("masked_attention", "cuda") is run
    unverified.why_not_auto = lambda **tensors: None
    assert dispatch.select("masked_attention") is run


def test_a_backend_for_this_device_that_is_passed_over_is_a_warning(slow_gpu):
    there, here = SimpleNamespace(device=SimpleNamespace(type="cuda")), torch.zeros(1)
    with pytest.warns(UserWarning, match='slower backend "reference" here. cuda: there is no GPU'):
        dispatch.select("masked_attention", q=there)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select("masked_attention", q=there)  # once
        dispatch.select("masked_attention", q=here)  # no GPU is missed where tensors are on a CPU
