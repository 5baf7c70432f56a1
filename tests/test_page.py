"""The picture of a plan and the page around it."""

import re
import xml.etree.ElementTree as tree
from html.parser import HTMLParser

import numpy as np
import pytest

from dit_accel import media
from dit_accel.errors import BadUsage
from dit_accel.page import generation_page
from dit_accel.plan_picture import legend, letter_colours, plan_picture
from dit_accel.run_report import Report, Row


def report(rows=(), letters=None) -> Report:
    letters = letters or {
        ".": "the model's own",
        "F": "Full()",
        "w": "Window(radius=(1, 1, 1))",
        "r": "Reuse(max_age=2)",
        "C": "Compute()",
    }
    return Report(
        recipe="mine", family="wan", steps=4, runs=1, counters={"full": 3, "window": 2}, rows=tuple(rows),
        legend=letters, notes=("the <grid> differs",), memory_bytes=0, predicted_bytes=0,
        levels=(1.0, 0.75, 0.5, 0.25), expects_work=True, attention_kept=0.75,
    )  # fmt: skip


def svg(text: str) -> tree.Element:
    """The first SVG that has a label, parsed: it must be well-formed."""
    found = re.search(r'<svg viewBox="0 0 980.*?</svg>', text, re.DOTALL)
    assert found
    return tree.fromstring(found.group())


def test_neighbours_with_one_letter_are_one_patch():
    row = Row("blocks.0.attn1", "both", ("FF", "FF", "Fw", "ww"), ("FF", "FF", "Fw", "ww"))
    paths = {path.get("class"): path.get("d", "") for path in svg(plan_picture(report([row]))).iter("path")}
    assert paths["exact"].count("M") == 2  # head 0 full for 3 steps, head 1 for 2
    assert paths["c0"].count("M") == 2


def test_a_step_that_went_otherwise_than_planned_is_framed_and_explained():
    row = Row("blocks.1", "cond", ("C", "r", "r", "C"), ("C", "C", "", "C"))
    drawn = report([row])
    frames = [rect for rect in svg(plan_picture(drawn)).iter("rect") if rect.get("class") == "other"]
    assert len(frames) == 1
    assert "not what was planned" in legend(drawn)
    assert "not what was planned" not in legend(report([Row("blocks.1", "cond", ("C",), ("C",))]))


def test_the_models_own_work_has_one_colour_and_each_choice_another():
    colours = letter_colours(report().legend)
    assert colours["."] == colours["F"] == colours["C"] == "exact"
    assert len({colours["w"], colours["r"], "exact"}) == 3


@pytest.mark.parametrize("steps", [1, 50, 1000])
def test_any_number_of_steps_and_heads_is_drawn(steps):
    row = Row("blocks.0.attn1", "both", ("Fw" * 20,) * steps, ("Fw" * 20,) * steps)
    assert list(svg(plan_picture(report([row]))).iter("path"))


def test_the_page_is_balanced_escaped_and_fetches_nothing():
    frames = np.random.default_rng(0).random((3, 33, 47, 3))
    page = generation_page(
        "<title>",
        "a <script>",
        media.mp4(frames, 8),
        {"seconds": "1"},
        report([Row("a", "both", ("F",), ("F",))]),
    )
    assert "a &lt;script&gt;" in page
    assert "the &lt;grid&gt; differs" in page
    assert not re.search(r'(src|href)="(?!data:)|https?:|url\(|@import', page)
    _Balanced().feed(page)


class _Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "input", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag


def test_an_odd_size_keeps_its_pixels_in_mp4(tmp_path):
    import imageio.v3 as iio

    frames = np.linspace(0, 1, 3 * 33 * 47 * 3).reshape(3, 33, 47, 3)
    media.save(tmp_path / "x.mp4", frames, fps=8)
    read = iio.imread(tmp_path / "x.mp4")
    assert read.shape == (3, 34, 48, 3)
    assert np.abs(read[:, :33, :47] / 255 - frames).mean() < 0.02
    assert iio.immeta(tmp_path / "x.mp4")["fps"] == 8


def test_a_gif_keeps_its_frames_and_its_pace(tmp_path):
    import imageio.v3 as iio

    frames = np.random.default_rng(0).random((4, 16, 16, 3))
    media.save(tmp_path / "x.gif", frames, fps=10)
    assert iio.imread(tmp_path / "x.gif").shape == (4, 16, 16, 3)
    assert iio.immeta(tmp_path / "x.gif")["duration"] == 100


def test_endings_are_checked_before_the_work(tmp_path):
    with pytest.raises(BadUsage, match="Change the ending"):
        media.check_suffix(tmp_path / "x.mp4", "image")
    media.check_suffix(tmp_path / "x.GIF", "video")
