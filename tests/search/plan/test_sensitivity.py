"""Channel weights against finite differences of the real denoisers, and the recorder of calls."""

import numpy as np
import pytest
import torch

from dit_accel.generate import generate
from dit_accel.search.plan import sensitivity
from dit_accel.search.plan.sensitivity import between, looked_at, recording, sensitivities

SITES = {
    "wan": "blocks.0.attn1",
    "pixart_sigma": "transformer_blocks.0.attn1",
    "qwen_image": "transformer_blocks.0.attn",
}


def recorded(made, steps):
    """The calls of one generation at some steps."""
    modules = {"transformer": made.model.pipe.transformer}
    with recording(modules, steps, made.model.family.guidance == "batched") as calls:
        generate(made.model, "a red ring", made.arguments, 3)
    return calls["transformer"]


@pytest.mark.parametrize("case", SITES)
def test_a_random_error_moves_the_velocity_as_foretold(case, tiny, monkeypatch):
    monkeypatch.setattr(sensitivity, "PROBES", 24)
    made = tiny(case)
    module, site = made.model.pipe.transformer, SITES[case]
    call = recorded(made, [4])[0]
    found = sensitivities(module, [site], [call])
    branch = "cond" if call.branch == "both" else call.branch
    weights = torch.from_numpy(found[site, branch, 4][0])
    moved = [_moved(module, site, call, seed) for seed in range(6)]
    foretold = [float((error.square().sum((0, 1)) * weights).sum()) for error, _ in moved]
    real = [change for _, change in moved]
    assert np.mean(real) == pytest.approx(np.mean(foretold), rel=0.35)


def _moved(module, site, call, seed):
    """A small error of the visual stream on cond, and the squared change of the velocity over its square."""
    size, noise = 1e-2, torch.Generator().manual_seed(seed)
    attention = module.get_submodule(site)
    kept = {}

    def hook(_module, _args, output):
        streams = output if isinstance(output, tuple) else (output,)
        rows = slice(len(streams[0]) // 2, None) if call.branch == "both" else slice(None)
        error = torch.zeros_like(streams[0])
        error[rows] = torch.randn(error[rows].shape, generator=noise)
        kept["error"] = error[rows].double()
        moved = (streams[0] + size * error, *streams[1:])
        return moved if isinstance(output, tuple) else moved[0]

    with torch.no_grad():
        plain = module(**call.arguments)[0]
        handle = attention.register_forward_hook(hook)
        try:
            other = module(**call.arguments)[0]
        finally:
            handle.remove()
    latent = call.arguments["hidden_states"]
    rows = min(plain.shape[1], latent.shape[1]) if plain.ndim >= 4 else plain.shape[1]  # no learned variance
    change = (other - plain).double()[:, :rows] / size
    return kept["error"], float(change.square().sum())


def test_the_model_is_left_as_it_was(tiny):
    made = tiny("wan")
    module = made.model.pipe.transformer
    wanting = [parameter.requires_grad for parameter in module.parameters()]
    calls = recorded(made, [2])
    sensitivities(module, [SITES["wan"]], calls)
    assert [parameter.requires_grad for parameter in module.parameters()] == wanting
    assert not module.get_submodule(SITES["wan"])._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(("case", "branches"), [("wan", ["cond", "uncond"]), ("pixart_sigma", ["both"])])
def test_calls_are_recorded_by_step_and_branch(case, branches, tiny):
    calls = recorded(tiny(case), [0, 5])
    assert [(call.step, call.branch) for call in calls] == [(step, b) for step in (0, 5) for b in branches]
    first = calls[0].arguments["hidden_states"]
    assert not torch.equal(first, calls[-1].arguments["hidden_states"])


def test_weights_between_two_looks_are_geometric_means():
    known = {0: (np.array([1.0, 4.0]),), 2: (np.array([4.0, 16.0]),)}
    table = between(known, 4)
    assert table[1][0] == pytest.approx([2.0, 8.0])
    assert table[3][0] == pytest.approx([4.0, 16.0])
    assert looked_at(9) == [0, 2, 4, 6, 8]
