"""Steps whose loss leaps: left out before they change a weight, told of, and in a row the end of the stage."""

import csv
import os
import signal

import pytest
import tiny
import torch

from radlads.config.schema import TrainConfig
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.train import spike_guard
from radlads.train.callbacks import Progress
from radlads.train.checkpoints.snapshots import checkpoints_in, read_position
from radlads.train.fit import run_stage
from radlads.train.optimizers.optim import build_optimizers
from radlads.train.optimizers.step import optimizer_step
from radlads.train.spike_guard import MEMORY_STEPS, NAMES, WARMUP_STEPS, SpikeGuard, judged
from radlads.train.stopping import Stopped

STEPS = 8


def after(losses, factor=2.0):
    """What is judged of each loss, and the numbers after the last."""
    state, verdicts = torch.zeros(len(NAMES)), []
    for loss in losses:
        is_spike, state = judged(torch.tensor(float(loss)), state, factor)
        verdicts.append(is_spike.item())
    return verdicts, dict(zip(NAMES, state.tolist(), strict=True))


def test_nothing_is_a_leap_before_there_is_a_usual_loss():
    verdicts, numbers = after([1, 100] * (WARMUP_STEPS // 2) + [1000])
    assert verdicts == [False] * WARMUP_STEPS + [True]
    assert numbers["usual_loss"] == pytest.approx(50.5)


def test_only_what_is_above_the_factor_is_left_out_and_it_moves_nothing():
    verdicts, numbers = after([1] * WARMUP_STEPS + [1.99, 5, 5, 1, 5])
    assert verdicts[WARMUP_STEPS:] == [False, True, True, False, True]
    assert (numbers["spikes_in_a_row"], numbers["spikes"], numbers["usual_steps"]) == (1, 3, WARMUP_STEPS + 2)
    assert numbers["usual_loss"] == pytest.approx(1 + 0.99 / 21 - 0.99 / 21 / 22)


def test_the_usual_loss_forgets():
    _, numbers = after([4] * 1000 + [2] * 5 * MEMORY_STEPS)
    assert numbers["usual_loss"] == pytest.approx(2, rel=0.01)


def test_a_loss_that_is_nan_is_left_to_the_check_of_all_losses():
    assert after([1] * WARMUP_STEPS + [float("nan")])[0][-1] is False


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("leave_out", [True, False])
def test_a_step_left_out_changes_neither_weights_nor_moments(teacher, optimizer, leave_out):
    student, _ = build_student(open_teacher(teacher), tiny.stage_config(teacher, "distill").model)
    optimizers = build_optimizers(student, TrainConfig(optimizer=optimizer))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    flag = torch.tensor(leave_out)
    optimizer_step(optimizers, student.parameters(), count=1, clip_val=1.0, leave_out=flag)
    same = [torch.equal(parameter, before[name]) for name, parameter in student.named_parameters()]
    assert all(same) is leave_out and any(same) is leave_out
    assert all(parameter.grad is None for parameter in student.parameters())
    moments = [state for each in optimizers for state in each.state_dict()["state"].values()]
    assert not leave_out or all(not value.any() for state in moments for value in state.values())


@pytest.mark.parametrize("value", [0.5, 1.0, -1.0])
def test_a_factor_that_would_leave_out_the_usual_is_refused(value):
    with pytest.raises(ValueError, match=r"spike_factor must be greater than 1, or 0 for off"):
        TrainConfig(spike_factor=value)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(spike_guard, "WARMUP_STEPS", 2)


@pytest.fixture
def leaps(monkeypatch):
    """Steps whose loss the guard is told to be 100 times what it is."""
    found = set()

    def taught(self, loss):
        step = int(self.state[[1, 3]].sum()) + 1
        return earlier(self, loss * (100 if step in found else 1))

    earlier = SpikeGuard.is_spike
    monkeypatch.setattr(SpikeGuard, "is_spike", taught)
    return found


def run(teacher, data, folder, **overrides):
    keys = {"my_exit_tokens": 16 * 4 * STEPS, "spike_factor": 3.0, "checkpoint_every_steps": 1, "keep_checkpoints": 9}
    config = tiny.stage_config(data, "align", **{f"train.{key}": value for key, value in (keys | overrides).items()})
    source, console = open_teacher(teacher), tiny.Silent()
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, console, parent="test")
    return console.lines


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_leap_is_told_and_its_step_left_out(teacher, corpus_folder, tmp_path, quick, leaps, monkeypatch):
    leaps.add(5)
    seen = {}
    earlier = Progress.on_train_batch_end

    def watched(self, trainer, pl_module, *rest):
        earlier(self, trainer, pl_module, *rest)
        seen[pl_module.steps_done] = torch.cat([p.detach().flatten() for p in pl_module.student.parameters()])

    monkeypatch.setattr(Progress, "on_train_batch_end", watched)
    lines = run(teacher, corpus_folder, tmp_path / "run")
    [told] = [line for line in lines if "left out" in line]
    assert "at step 5, more than train.spike_factor 3 times the usual" in told
    unchanged = [step for step in range(2, STEPS + 1) if torch.equal(seen[step], seen[step - 1])]
    assert unchanged == [5]
    assert [float(row["spikes_in_a_row"]) for row in rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert [float(row["spikes"]) for row in rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_three_leaps_in_a_row_end_the_stage_and_name_what_is_from_before(
    teacher, corpus_folder, tmp_path, quick, leaps
):
    leaps |= {5, 6, 7}
    wanted = r"at step 7, more than .* as were the 2 before it: go on from before with --train\.resume .*/step-000003"
    with pytest.raises(ValueError, match=wanted):
        run(teacher, corpus_folder, tmp_path / "run")
    checkpoint = tmp_path / "run.partial" / "checkpoints" / "step-000003"
    leaps.clear()
    lines = run(teacher, corpus_folder, tmp_path / "run", resume=str(checkpoint), lr_init=1e-4, spike_factor=4.0)
    assert any("train.spike_factor is 3.0 there and 4.0 here" in line for line in lines)
    assert len(rows(tmp_path / "run")) == STEPS


def test_without_an_earlier_checkpoint_that_is_said(teacher, corpus_folder, tmp_path, quick, leaps):
    leaps |= {5, 6, 7}
    with pytest.raises(ValueError, match="start over \\(no checkpoint is older\\) and lower"):
        run(teacher, corpus_folder, tmp_path / "run", checkpoint_every_steps=6)


def test_a_guard_that_goes_on_knows_what_it_knew(teacher, corpus_folder, tmp_path, quick, leaps, monkeypatch):
    leaps |= {4, 6}
    run(teacher, corpus_folder, tmp_path / "straight")
    earlier = Progress.on_train_batch_end

    def terminated(self, trainer, pl_module, *rest):
        earlier(self, trainer, pl_module, *rest)
        if pl_module.steps_done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Progress, "on_train_batch_end", terminated)
        run(teacher, corpus_folder, tmp_path / "run")
    newest = checkpoints_in(tmp_path / "run.partial")[-1]
    assert dict(zip(NAMES, read_position(newest).spike_guard, strict=True))["spikes_in_a_row"] == 1
    run(teacher, corpus_folder, tmp_path / "run")
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_without_the_guard_nothing_is_counted(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "run", spike_factor=0.0, my_exit_tokens=64)
    assert not set(NAMES) & rows(tmp_path / "run")[0].keys()
