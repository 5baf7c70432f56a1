"""Which prompts a comparison uses when none are given."""

import pytest

from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.prompts import GENERAL, jobs
from dit_accel.scenes import is_held_out, parse


def model(**defaults: object) -> Model:
    return Model("some/model", pipe=None, family=None, defaults=defaults, toy=False)


def test_a_model_of_scenes_gets_captions_that_training_never_saw():
    chosen = jobs(model(captions="scenes"), None, 5, seed=3)
    captions = [job.prompt for job in chosen]
    assert len(set(captions)) == 5
    assert all(is_held_out(caption) and parse(caption) for caption in captions)
    assert [job.seed for job in chosen] == [3, 4, 5, 6, 7]
    assert jobs(model(captions="scenes"), None, 5, seed=3) == chosen


def test_any_other_model_gets_general_prompts_as_many_as_asked():
    assert len(jobs(model(), None, len(GENERAL) + 1, seed=0)) == len(GENERAL) + 1
    assert jobs(model(), None, 1, seed=0)[0].prompt == GENERAL[0]


def test_a_file_is_cut_to_the_number_asked(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n  two  \n# not me\n\nthree\n", encoding="utf-8")
    assert [job.prompt for job in jobs(model(), file, 2, seed=0)] == ["one", "two"]
    assert len(jobs(model(), file, None, seed=0)) == 3


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\xff\xfe\x00broken"])
def test_a_file_without_prompts_is_refused(content, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(BadUsage, match=r"prompts\.txt"):
        jobs(model(), file, None, seed=0)
