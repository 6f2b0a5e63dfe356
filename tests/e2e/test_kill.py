"""SIGKILL at random moments, also while a checkpoint is being written: the run ends bit-identical to one left alone.

RADLADS_KILL_MOMENTS=20 adds that many runs, each killed once (three minutes on a busy machine).
"""

import multiprocessing
import os
import random
import signal
import time

import pytest
import tiny
import torch
from test_conversion import command

from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.train.checkpoints.snapshots import CHECKPOINTS
from radlads.train.fit import run_stage
from radlads.train.lightning_module import StageModule

# A server that has imported everything, and computed nothing, forks in milliseconds what else would start in seconds
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["radlads.train.fit", "radlads.convert.student", "lightning.pytorch.loggers.tensorboard"]
)
MOMENTS = int(os.environ.get("RADLADS_KILL_MOMENTS", "0"))
COMPARED = ("model.safetensors", "metrics.csv", "heldout.csv")


def stage(teacher, data, folder):
    """Twelve steps, a checkpoint after each, held-out loss after every third."""
    torch.set_num_threads(1)
    keys = {"my_exit_tokens": 16 * 4 * 12, "checkpoint_every_steps": 1, "heldout_every_steps": 3, "heldout_tokens": 64}
    keys["validation_data_file"] = str(data / "heldout")
    config = tiny.stage_config(data, "distill", **{f"train.{key}": value for key, value in keys.items()})
    source = open_teacher(teacher)
    torch.manual_seed(config.train.seed_everything)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")


def start(teacher, data, folder):
    process = PROCESSES.Process(target=stage, args=(teacher, data, folder))
    process.start()
    return process


def finish(teacher, data, folder):
    process = start(teacher, data, folder)
    process.join(120)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def straight(teacher, corpus_folder, tmp_path_factory):
    """The folder of the run that is left alone, and how long it took from when its folder appeared."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = start(teacher, corpus_folder, folder)
    began = appears(folder)
    process.join(120)
    assert process.exitcode == 0
    return folder, time.monotonic() - began


def appears(folder):
    deadline = time.monotonic() + 120
    while not folder.with_name("run.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return time.monotonic()


def kill_after(seconds, teacher, data, folder):
    """Kill a run so many seconds after its folder has appeared. Whether that was amid writing a checkpoint."""
    process = start(teacher, data, folder)
    appears(folder)
    time.sleep(seconds)
    process.kill()
    process.join()
    return any((folder.with_name("run.partial") / CHECKPOINTS).glob("*.partial"))


def assert_same(folder, expected):
    for name in COMPARED:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_killed_again_and_again_it_ends_as_if_left_alone(straight, teacher, corpus_folder, tmp_path):
    expected, seconds = straight
    for share in (0.2, 0.3, 0.4):
        kill_after(share * seconds, teacher, corpus_folder, tmp_path / "run")
    finish(teacher, corpus_folder, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MOMENTS, reason="RADLADS_KILL_MOMENTS says how many")
def test_killed_at_any_moment_it_ends_as_if_left_alone(straight, teacher, corpus_folder, tmp_path):
    expected, seconds = straight
    moments, amid_writing, unfinished = random.Random(5), 0, 0
    for number in range(MOMENTS):
        folder = tmp_path / str(number) / "run"
        amid_writing += kill_after(moments.uniform(0, seconds), teacher, corpus_folder, folder)
        if not folder.exists():
            unfinished += 1
            finish(teacher, corpus_folder, folder)
        assert_same(folder, expected)
    print(f"{unfinished} of {MOMENTS} killed unfinished, {amid_writing} amid writing a checkpoint")
    assert unfinished >= MOMENTS / 2
    assert amid_writing >= 1


def test_a_demo_that_is_terminated_goes_on_amid_its_stage(teacher, corpus_folder, tmp_path, capsys, monkeypatch):
    argv = command(teacher, corpus_folder, tmp_path / "run")
    process = PROCESSES.Process(target=main, args=(argv,))
    process.start()
    unfinished = tmp_path / "run" / "2-distill.partial"
    deadline = time.monotonic() + 120
    while not (unfinished / "metrics.csv").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    process.terminate()
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM
    [checkpoint] = (unfinished / CHECKPOINTS).iterdir()
    step = StageModule.training_step

    def terminated_when_extending(self, *batch):
        if self.stage.name == "extend":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    monkeypatch.setattr(StageModule, "training_step", terminated_when_extending)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "1-align: finished earlier, kept" in said
    assert f"distill: going on after step {int(checkpoint.name[5:])} of 10, from {checkpoint}" in said
    assert "SIGTERM: stopped after step 1 of 10, with the checkpoint" in said
    assert (tmp_path / "run" / "2-distill" / "manifest.json").is_file()
