"""Wrong input: a clear error, and a pipeline that is as before (promise 12); bare denoisers."""

import pytest
import torch
from contract.rows import build, denoisers, plain, recipe, run
from torch import nn

import dit_accel
from dit_accel.errors import AlreadyAccelerated, RecipeError, UnsupportedPipeline
from dit_accel.proxy import Proxy
from dit_accel.recipe import Recipe

HEAD = 'schema = 1\n[made_for]\nsteps = 9\n[choices]\nF = { method = "full" }\nr = { method = "reuse" }\n'


def untouched(pipe) -> bool:
    """No hook, no proxy, no key on any module."""
    modules = [child for module in denoisers(pipe) for child in module.modules()]
    names = {name for child in modules for name in child.__dict__}
    proxies = [child for child in modules if isinstance(getattr(child, "processor", None), Proxy)]
    return not proxies and not names & {"_diffusers_hook", "_dit_accel_key"}


@pytest.mark.parametrize(
    "tables",
    [
        '[attention.both]\n"blocks.9.attn1" = ["F"]',
        '[attention.both]\n"blocks.0.attn1" = ["FF"]',
        '[timeline.both]\n"*" = "rrrrrrrrr"',
        '[timeline.both]\n"blocks.0-1" = "FFFFFFFFF"',
    ],
)
def test_a_recipe_that_does_not_fit_leaves_the_pipeline_alone(tables: str):
    pipe = build("wan")
    with pytest.raises(RecipeError):
        dit_accel.accelerate(pipe, Recipe.from_text(HEAD + tables))
    assert untouched(pipe)
    assert torch.equal(run(pipe, "wan"), plain("wan"))
    dit_accel.accelerate(pipe, "neutral")  # nothing of the failed try is in the way


def test_a_bad_recipe_for_a_running_pipeline_keeps_the_old_one():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    expected = run(pipe, "wan")
    with pytest.raises(RecipeError):
        dit_accel.accelerate(
            pipe, Recipe.from_text(HEAD + '[attention.both]\n"x.0.attn1" = ["F"]'), replace=True
        )
    assert torch.equal(run(pipe, "wan"), expected)
    assert handle.report().did_something


def test_an_unknown_recipe_name_is_a_recipe_error():
    pipe = build("wan")
    with pytest.raises(RecipeError):
        dit_accel.accelerate(pipe, "no-such/recipe/anywhere")
    assert untouched(pipe)


def test_a_second_recipe_needs_replace():
    pipe = build("wan")
    first = dit_accel.accelerate(pipe, recipe("window", "wan"))
    with pytest.raises(AlreadyAccelerated, match=r"already runs recipe window.*replace=True"):
        dit_accel.accelerate(pipe, "neutral")
    second = dit_accel.accelerate(pipe, "neutral", replace=True)
    assert torch.equal(run(pipe, "wan"), plain("wan"))
    first.restore()  # the handle of a replaced recipe does nothing any more
    assert run(pipe, "wan") is not None and second.report().counters["full"] > 0
    second.restore()
    assert untouched(pipe)


def test_two_pipelines_around_one_denoiser_cannot_both_be_accelerated():
    pipe = build("wan")
    other = type(pipe)(**pipe.components)
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    expected = run(pipe, "wan")
    with pytest.raises(AlreadyAccelerated):
        dit_accel.accelerate(other, "neutral")
    assert torch.equal(run(pipe, "wan"), expected)
    handle.restore()
    assert untouched(pipe)
    dit_accel.accelerate(other, "neutral")


class Unknown(nn.Module):
    """A denoiser that no family describes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_an_unknown_family_runs_dense_with_a_warning():
    pipe = build("wan")
    pipe.transformer = Unknown()
    with pytest.warns(UserWarning, match="no denoiser of a known family .found: Unknown."):
        handle = dit_accel.accelerate(pipe, "neutral")
    assert untouched(pipe)
    handle.restore()
    with pytest.raises(UnsupportedPipeline, match="register_family"):
        dit_accel.accelerate(pipe, "neutral", strict=True)


def test_something_without_a_denoiser_is_unsupported():
    with pytest.raises(UnsupportedPipeline):
        dit_accel.accelerate(object(), "neutral")


def test_a_report_of_a_plain_pipeline_is_an_error_that_says_what_to_do():
    with pytest.raises(UnsupportedPipeline, match=r"Call dit_accel.accelerate\(pipe, recipe\) first"):
        dit_accel.report(build("wan"))


def test_restore_of_a_plain_pipeline_does_nothing():
    dit_accel.restore(build("wan"))


def test_before_the_first_run_there_is_no_plan_and_nothing_in_the_report():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    assert handle.plan is None and "run the pipeline once" in handle.explain()
    assert handle.report().counters == {} and not handle.report().did_something
    run(pipe, "wan")
    assert "FwwF" in handle.explain() and handle.plan is not None
    assert "window" in str(handle.report()) and handle.report().as_dict()["did_something"]


def test_the_context_manager_restores_also_when_the_block_raises():
    pipe = build("wan")
    with pytest.raises(KeyError), dit_accel.accelerated(pipe, recipe("window", "wan")):
        raise KeyError("mine")
    assert untouched(pipe)
    with dit_accel.accelerated(pipe, recipe("window", "wan")) as handle:
        run(pipe, "wan")
        assert dit_accel.report(pipe) == handle.report()
    assert torch.equal(run(pipe, "wan"), plain("wan"))


def test_an_error_while_installing_undoes_what_was_installed(monkeypatch: pytest.MonkeyPatch):
    pipe = build("wan22")

    def fail(*_):
        raise RuntimeError("half-way")

    monkeypatch.setattr("dit_accel.block_hooks.BlockHook.__init__", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        dit_accel.accelerate(pipe, recipe("reuse span, stored gates", "wan22"))
    assert untouched(pipe)


def test_a_bare_denoiser_may_stand_for_its_pipeline():
    """Without a schedule there are no steps: it runs dense and says so."""
    pipe = build("wan")
    x = torch.randn(1, 4, 3, 8, 10)
    arguments = {
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "return_dict": False,
    }
    expected = pipe.transformer(x, **arguments)[0]
    handle = dit_accel.accelerate(pipe.transformer, recipe("window", "wan"))
    assert torch.equal(pipe.transformer(x, **arguments)[0], expected)
    assert any("outside a schedule" in note for note in handle.report().notes)
    handle.restore()
    assert untouched(pipe)
