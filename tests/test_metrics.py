"""Metrics against their definitions, and faithfulness on prompts that are not the toys'."""

import numpy as np
import pytest
import torch

from dit_accel.metrics import faithfulness, psnr, ssim
from dit_accel.scenes import parse, render

CAPTION = "a red ring on a navy striped background"


def test_psnr_of_a_known_error():
    clip = np.full((2, 16, 16, 3), 0.5, np.float32)
    assert psnr(clip + 0.1, clip) == pytest.approx(20, abs=1e-4)
    assert psnr(clip, clip) == float("inf")


def test_ssim_is_one_for_equal_frames_and_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    first, second = torch.rand(2, 3, 40, 33, 3, generator=torch.Generator().manual_seed(0))
    second = 0.7 * first + 0.3 * second
    assert ssim(first, first) == pytest.approx(1, abs=1e-5)
    assert 0.3 < ssim(second, first) < 0.99
    theirs = image.structural_similarity_index_measure(
        second.movedim(-1, 1), first.movedim(-1, 1), data_range=1.0
    )
    assert ssim(second, first) == pytest.approx(theirs.item(), abs=5e-3)


def test_faithfulness_scores_the_toys_language_and_knows_when_it_does_not_apply():
    picture = render(parse(CAPTION), 1, 1, 128, 128)
    assert faithfulness(picture, CAPTION) == 1
    assert faithfulness(torch.from_numpy(picture), "a blue disc on a forest plain background") < 0.3
    assert faithfulness(picture, "a cat on a skateboard") is None


def test_wrong_shapes_and_types_are_refused():
    clip = np.zeros((1, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match="compare results of the same size"):
        psnr(clip, clip[:, :8])
    with pytest.raises(ValueError, match="pass floats in"):
        psnr((clip * 255).astype(np.uint8), clip)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(clip[:, :8], clip[:, :8])
