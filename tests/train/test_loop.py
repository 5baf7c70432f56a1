"""The training loop: the same weights whatever interrupts it and however many processes run it."""

import builtins
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dit_accel.errors import BadUsage
from dit_accel.testing import TINY
from dit_accel.train import checkpoint
from dit_accel.train.loop import LoopConfig, learning_rate, train
from dit_accel.train.optimizer import Adam, MuonAdam

WORKER = Path(__file__).with_name("loop_worker.py")
TIMEOUT = 300  # seconds: imports on a busy machine

spec = importlib.util.spec_from_file_location("loop_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
fresh, loss_of, config_of = worker.fresh, worker.loss_of, worker.config_of


def log_of(folder):
    """The lines of a log without their seconds."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def launch(arguments, ranks=1):
    """The worker in processes of its own; the exit status."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        command[1:1] = [*launcher, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    return done.returncode, done.stdout + done.stderr


def assert_same(folder, other):
    """Two trainings ended alike: every tensor of the state, and every line of the log."""
    ours, theirs = (load_file(each / "state.safetensors") for each in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert log_of(folder) == log_of(other)
    for name in ("weights", "average"):
        ours, theirs = (load_file(each / f"{name}.safetensors") for each in (folder, other))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_an_interrupted_training_resumes_to_identical_weights(tmp_path):
    def config(name, steps):
        return LoopConfig(tmp_path / name, steps, cooldown=1, save_every=5, log_every=5, precision="no")

    straight, first, second = fresh(), fresh(), fresh()
    train(straight, loss_of, config("straight", 20))
    train(first, loss_of, config("resumed", 10))
    train(second, loss_of, config("resumed", 20))
    # the cool-down of the first half was the last of its steps: it is part of the run that is resumed
    for name, weight in second.named_parameters():
        assert not torch.equal(weight, dict(first.named_parameters())[name])
    replay = fresh()
    train(replay, loss_of, config("replay", 10))
    train(replay, loss_of, config("replay", 20))
    for ours, theirs in zip(second.parameters(), replay.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make_optimizer", [MuonAdam, Adam])
def test_a_crash_between_checkpoints_loses_nothing(make_optimizer, tmp_path):
    def crash(module, number):
        if number == 10:
            raise RuntimeError("power cut")
        return loss_of(module, number)

    train(straight := fresh(), loss_of, config_of(tmp_path / "straight"), make_optimizer=make_optimizer)
    with pytest.raises(RuntimeError, match="power cut"):
        train(fresh(), crash, config_of(tmp_path / "crashed"), make_optimizer=make_optimizer)
    # step 9 was told already, the checkpoint is of step 8
    assert [line["step"] for line in log_of(tmp_path / "crashed")] == [3, 6, 9]
    train(resumed := fresh(), loss_of, config_of(tmp_path / "crashed"), make_optimizer=make_optimizer)
    assert_same(tmp_path / "crashed", tmp_path / "straight")
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Killed(BaseException):
    """What no handler of the loop may catch."""


def points(patch, at):
    """Die at file operation `at` of all checkpoints: before a write, in it, before its renaming."""
    passed = [0]

    def die():
        passed[0] += 1
        if passed[0] - 1 == at:
            raise Killed

    def half(tensors, file, metadata=None):
        die()
        save_file(tensors, file, metadata=metadata)
        whole = Path(file).read_bytes()
        Path(file).write_bytes(whole[: len(whole) // 2])
        die()
        Path(file).write_bytes(whole)

    def rename(self, target):
        die()
        os.replace(self, target)

    patch.setattr(checkpoint, "save_file", half)
    patch.setattr(Path, "replace", rename)
    return passed


def test_dying_anywhere_in_a_save_changes_nothing(tmp_path, monkeypatch):
    def run(folder, patch=None, at=-1):
        module, kept = fresh(), []

        def keep(step):
            kept.append(step)
            save_file({"x": module[0].weight.detach().clone()}, folder / "kept.safetensors")

        with monkeypatch.context() as patch:
            passed = points(patch, at)
            try:
                train(module, loss_of, config_of(folder), keep)
            except Killed:
                return None
        return passed[0]

    operations = run(tmp_path / "straight")
    assert operations == 3 * 3 * 3  # three checkpoints of three files
    for at in range(operations):
        folder = tmp_path / f"killed{at}"
        assert run(folder, at=at) is None
        run(folder)
        assert_same(folder, tmp_path / "straight")
        # what is written beside a checkpoint is of that checkpoint
        kept = load_file(folder / "kept.safetensors")["x"]
        assert torch.equal(kept, load_file(tmp_path / "straight" / "average.safetensors")["0.weight"])


def test_a_process_killed_in_the_middle_of_a_save_goes_on(tmp_path):
    status, told = launch([tmp_path / "killed", 12, 1, 6])  # the state of the second checkpoint
    assert status == -signal.SIGKILL, told
    with pytest.raises(Exception, match=r"[Ee]rror|incomplete|Invalid"):
        load_file(tmp_path / "killed" / "state.tmp")
    with safe_open(tmp_path / "killed" / "state.safetensors", "pt") as file:
        assert file.metadata()["done"] == "4"
    train(fresh(), loss_of, config_of(tmp_path / "killed"), make_optimizer=Adam)
    train(fresh(), loss_of, config_of(tmp_path / "straight"), make_optimizer=Adam)
    assert_same(tmp_path / "killed", tmp_path / "straight")


def test_two_processes_take_the_steps_of_one(tmp_path):
    status, told = launch([tmp_path / "two", 12, 4], ranks=2)
    assert status == 0, told
    train(fresh(), loss_of, config_of(tmp_path / "one", accumulate=4), make_optimizer=Adam)
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-6), name
    curve, other = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert [line["step"] for line in curve] == [line["step"] for line in other] == [3, 6, 9, 12]
    for line, alone in zip(curve, other, strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=2e-5)
    # and it goes on in one process where two have stopped
    train(fresh(), loss_of, config_of(tmp_path / "two", steps=16, accumulate=4), make_optimizer=Adam)
    assert [line["step"] for line in log_of(tmp_path / "two")] == [3, 6, 9, 12, 15]


def test_processes_that_cannot_share_a_step_are_told(tmp_path):
    status, told = launch([tmp_path / "odd", 12, 3], ranks=2)
    assert status != 0
    assert "asked to train with 3 micro-batches a step in 2 processes" in told


class Descent(torch.optim.SGD):
    """Gradient descent without a state: a step is as long as its gradient, which Muon and Adam forget."""

    def __init__(self, named, lr):
        super().__init__([p for _, p in named], lr=lr)
        self.lr = lr

    def tensors(self):
        return {}


def test_micro_batches_sum_to_the_batch(tmp_path):
    """Two halves of a batch give the step of the whole."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def loss_on(rows):
        def loss_of(module, number):
            part = x.chunk(rows)[number % rows]
            error = (module(part) - part.flip(1)).square().mean()
            return error, {"loss": error.item()}

        return loss_of

    trained = {}
    for rows in (1, 2):
        config = replace(config_of(tmp_path / str(rows), accumulate=rows), lr=0.1)
        train(module := fresh(), loss_on(rows), config, make_optimizer=Descent)
        trained[rows] = module, log_of(tmp_path / str(rows))
    for ours, theirs in zip(trained[1][0].parameters(), trained[2][0].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    whole, halves = ([line["loss"] for line in trained[rows][1]] for rows in (1, 2))
    assert whole == pytest.approx(halves, abs=2e-5) and whole[-1] < whole[0]


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_recomputed_activations_change_no_bit(name, tmp_path, monkeypatch):
    calls = []
    kept = torch.utils.checkpoint.checkpoint
    case = TINY[name]

    def counted(*arguments, **named):
        calls.append(1)
        return kept(*arguments, **named)

    def weights(recompute):
        transformer = case.build().transformer.requires_grad_(True)
        noisy = case_inputs(case)

        def loss_of(module, number):
            loss = module(**noisy, return_dict=False)[0].float().square().mean()
            return loss, {"loss": loss.item()}

        config = replace(config_of(tmp_path / f"{recompute}", steps=2), recompute=recompute)
        train(transformer, loss_of, config)
        return dict(transformer.named_parameters())

    plain = weights(False)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    assert not calls
    again = weights(True)
    assert calls
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


def case_inputs(case):
    """What a tiny pipeline gives its transformer at the first step."""
    pipe, seen = case.build(), []

    class Seen(Exception):
        pass

    def look(module, args, kwargs):
        seen.append(kwargs)
        raise Seen

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen):
        case.call(pipe, steps=2)
    clean = {key: value for key, value in seen[0].items() if key != "return_dict"}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in clean.items()}


def test_a_module_without_blocks_cannot_recompute(tmp_path):
    with pytest.raises(BadUsage, match=r"asked to compute activations of Sequential again .* Leave"):
        train(fresh(), loss_of, replace(config_of(tmp_path), recompute=True))


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    config = LoopConfig(tmp_path, steps=100, lr=1.0, warmup=10, cooldown=20)
    rates = [round(learning_rate(config, step), 3) for step in (0, 9, 50, 80, 90, 99)]
    assert rates == [0.1, 1, 1, 1, 0.5, 0.05]
    constant = replace(config, warmup=0, cooldown=0)
    assert [learning_rate(constant, step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_a_state_of_the_first_format_goes_on(tmp_path):
    """Before the log's sums were part of it, a state had two words of metadata."""
    train(fresh(), loss_of, config_of(tmp_path / "old", steps=4))
    train(fresh(), loss_of, config_of(tmp_path / "new", steps=4))
    file = tmp_path / "old" / "state.safetensors"
    with safe_open(file, "pt") as opened:
        told = {key: opened.metadata()[key] for key in ("done", "lr")}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata=told)
    trained = {}
    for name in ("old", "new"):
        train(module := fresh(), loss_of, config_of(tmp_path / name, steps=8))
        trained[name] = module
    for ours, theirs in zip(trained["old"].parameters(), trained["new"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_modules_state_and_no_state_at_all_are_refused(tmp_path):
    train(fresh(), loss_of, config_of(tmp_path, steps=4))
    wider = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    with pytest.raises(
        BadUsage, match=r"3 weights do not fit: 0.bias is \(24,\) in the module and \(16,\) in the"
    ):
        train(wider, loss_of, config_of(tmp_path, steps=8))
    (tmp_path / "state.safetensors").write_bytes(b"not this")
    with pytest.raises(BadUsage, match=r"it is not the state of a training .* Remove it"):
        train(fresh(), loss_of, config_of(tmp_path, steps=8))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"precision": "fp16"}, 'train in "fp16"; known: no, bf16'),
        ({"accumulate": 0}, "accumulate 0; it must be"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(wrong, said, tmp_path):
    with pytest.raises(BadUsage, match=said):
        LoopConfig(tmp_path, 4, **wrong)


def test_the_losses_are_drawn_beside_the_log(tmp_path):
    train(fresh(), loss_of, replace(config_of(tmp_path), plot=True))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_training_says_so_once_and_goes_on(tmp_path, monkeypatch, capfd):
    find = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    train(fresh(), loss_of, replace(config_of(tmp_path), plot=True))
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("matplotlib is not installed") == 1 and "pip install 'dit_accel[plot]'" in told
    assert not (tmp_path / "loss.png").exists() and len(log_of(tmp_path)) == 4


def test_who_listens_hears_every_step(tmp_path):
    heard = []
    train(fresh(), loss_of, config_of(tmp_path), told=lambda *what: heard.append(what))
    assert [(done, total) for done, total, _ in heard] == [(step, 12) for step in range(1, 13)]
    assert all(numbers["loss"] > 0 for *_, numbers in heard)
