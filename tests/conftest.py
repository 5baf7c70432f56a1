"""Rules of the whole suite: no network, one thread, fixed seeds, and memory that is never zero by luck."""

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from dit_accel.testing import poisoned_memory

torch.set_num_threads(1)


TINY_CALLS = {
    "wan": {"height": 32, "width": 48, "num_frames": 5},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9},  # its VAE keeps odd counts of latent frames
    "pixart_sigma": {"height": 32, "width": 48, "use_resolution_binning": False},
    "qwen_image": {"height": 32, "width": 48},
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Give the folder of a tiny pipeline as save_pretrained writes it, with a generation.json."""
    from dit_accel.testing import TINY

    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            TINY[name].build(complete=True, layers=2).save_pretrained(root / name)
            defaults = TINY_CALLS[name] | {"num_inference_steps": 2, "guidance_scale": 2.0, "fps": 8}
            (root / name / "generation.json").write_text(json.dumps(defaults))
        return root / name

    return folder


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, so that its result does not depend on what ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_is_never_zero_by_luck():
    """A kernel that reads what it never wrote meets NaN."""
    with poisoned_memory():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Tests marked `gpu` are skipped, not failed, on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
