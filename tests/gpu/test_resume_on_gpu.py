"""A stage that stops and goes on, on a GPU: optimisers, random numbers and stage 1's recorded graph."""

import csv
import os
import signal

import pytest
import tiny
import torch
from gpu_comparison import DRY_RUN

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.train.fit import run_stage
from radlads.train.lightning_module import StageModule
from radlads.train.logging.gpus import gpu_called
from radlads.train.stopping import Stopped

pytestmark = pytest.mark.gpu


def run(teacher, data, folder, stage, precision):
    keys = {"accelerator": "cpu" if DRY_RUN else "gpu", "precision": precision, "my_exit_tokens": 16 * 4 * 12}
    config = tiny.stage_config(data, stage, **{f"train.{key}": value for key, value in keys.items()})
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("stage", "precision"), [("align", "bf16"), ("distill", "bf16-true")])
def test_a_stopped_run_goes_on_as_if_it_had_not(teacher, corpus_folder, tmp_path, monkeypatch, stage, precision):
    run(teacher, corpus_folder, tmp_path / "straight", stage, precision)
    step = StageModule.training_step

    def stopped_in_step_six(self, tokens, batch_idx):
        if self.steps_done == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, tokens, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", stopped_in_step_six)
        with pytest.raises(Stopped):
            run(teacher, corpus_folder, tmp_path / "run", stage, precision)
    run(teacher, corpus_folder, tmp_path / "run", stage, precision)
    assert losses(tmp_path / "run")[:6] == pytest.approx(losses(tmp_path / "straight")[:6], rel=1e-3)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=5e-3)


@pytest.mark.skipif(DRY_RUN, reason="says nothing without a GPU")
def test_rows_say_what_the_gpu_does_and_holds(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "run", "distill", "bf16-true")
    with (tmp_path / "run" / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert all(0 < float(row["peak_memory_gb"]) < 2 for row in rows)
    known = gpu_called(torch.cuda.get_device_name()) is not None
    assert all(0 < float(row["mfu"]) < 1 if known else "mfu" not in row for row in rows)
