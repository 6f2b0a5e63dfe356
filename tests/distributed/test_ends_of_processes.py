"""How a run of several processes starts, stops, goes on and fails: none waits for one that is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages
import tiny
from launch import AT_MOST_S, curve, run, start
from tolerances import TRAJECTORY_MAX

from radlads.config.load import load_config
from radlads.train.processes.group import ALONE, check_processes
from radlads.train.processes.joining import joined

SOON_S = 60  # from the end of one process to that of the others
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    folder = stages.corpus(tmp_path_factory.mktemp("ends"))
    run(folder, [{"keys": stages.keys(folder, teacher, "align", "one", devices=1, micro_bsz=8)}])
    return folder


def assert_same_curve(folder, name):
    expected = curve(folder, "one")
    assert curve(folder, name) == pytest.approx(expected, rel=TRAJECTORY_MAX)
    assert curve(folder, name, "optimizer_step") == list(range(1, len(expected) + 1))


@pytest.mark.parametrize(("rank", "strategy"), [(0, "ddp"), (1, "fsdp")])
def test_when_a_process_is_killed_the_others_end_and_the_run_goes_on(folder, teacher, rank, strategy):
    name = f"killed-{rank}"
    keys = stages.keys(folder, teacher, "align", name, strategy=strategy, checkpoint_every_steps=4)
    process = start(folder, [{"keys": keys, "kill": [rank, 9]}])
    checkpoint = folder / f"{name}.partial" / "checkpoints" / "step-000008"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()  # the next step kills
    out, err = process.communicate(timeout=AT_MOST_S)
    assert time.monotonic() - began < SOON_S
    assert process.returncode == (-signal.SIGKILL if rank == 0 else 2), (out, err)
    assert ("process 0 of 2 is gone" if rank == 0 else "was ended by SIGKILL") in err
    assert "start the same command again to go on from the last checkpoint" in err
    assert "Traceback" not in err
    out, _ = run(folder, [{"keys": keys}])
    assert f"going on after step 8 of {stages.STEPS}, from {folder / name}.partial/checkpoints/step-000008" in out
    assert_same_curve(folder, name)


def test_a_signal_stops_all_and_another_number_of_processes_goes_on(folder, teacher):
    """From two processes to one, by either strategy, and from one to two; also before the first step."""

    def entry(name, **settings):
        return {"keys": stages.keys(folder, teacher, "align", name, **settings)}

    names = {strategy: f"stopped-{strategy}" for strategy in ("ddp", "fsdp", "one")}
    ddp, fsdp = (entry(names[strategy], strategy=strategy) | {"stop": [1, 6]} for strategy in ("ddp", "fsdp"))
    alone = {"devices": 1, "micro_bsz": 4, "accumulate_grad_batches": 2}
    one = entry(names["one"], **alone) | {"stop": [0, 6], "goes_on": True}
    early = [
        entry(f"early-{rank}", accumulate_grad_batches=2, micro_bsz=2) | {"stop": [rank, "before"], "goes_on": True}
        for rank in range(2)
    ]
    by_two, _ = run(folder, [*early, ddp | {"goes_on": True}, fsdp], code=128 + signal.SIGTERM)
    early_one = entry("early-one", **alone) | {"stop": [0, "before"], "goes_on": True}
    by_one, _ = run(folder, [early_one, one, entry(names["ddp"], **alone), entry(names["fsdp"], **alone)])
    by_two_again, _ = run(folder, [entry(names["one"], strategy="fsdp")])
    assert by_two.count(f"SIGTERM: stopped after step 7 of {stages.STEPS}, with the checkpoint") == 2
    assert by_one.count(f"SIGTERM: stopped after step 7 of {stages.STEPS}, with the checkpoint") == 1
    assert by_two.count(f"SIGTERM: stopped after step 1 of {stages.STEPS}, with the checkpoint") == len(early)
    assert by_one.count(f"SIGTERM: stopped after step 1 of {stages.STEPS}, with the checkpoint") == 1
    assert by_one.count(f"going on after step 7 of {stages.STEPS}") == 2
    assert by_two_again.count(f"going on after step 7 of {stages.STEPS}") == 1
    for name in names.values():
        assert_same_curve(folder, name)


def test_a_sharded_student_goes_on_whole_after_measurements(folder, teacher):
    """Embedding, head and norm are gathered by every forward pass, held-out ones included."""
    settings = {"strategy": "fsdp", "load_model": str(folder / "one"), "checkpoint_every_steps": 4}
    settings |= {
        "heldout_every_steps": 4,
        "heldout_tail_tokens": 200,
        "heldout_tokens": 64,
        "my_exit_tokens": 16 * 8 * 12,
    }
    kinds = {"adamw": {}, "schedule-free": {"optimizer": "adamwschedulefree"}, "bf16": {"precision": "bf16-true"}}
    entries = []
    for kind, own in kinds.items():
        straight, resumed = (
            {"keys": stages.keys(folder, teacher, "distill", f"{name}-{kind}", **settings, **own)}
            for name in ("straight", "resumed")
        )
        entries += [straight, resumed | {"stop": [1, 7], "goes_on": True}, resumed]
    out, _ = run(folder, entries)
    assert out.count("going on after step 8 of 12") == len(kinds)
    for kind in kinds:
        expected = curve(folder, f"straight-{kind}")
        assert len(expected) == 12
        assert curve(folder, f"resumed-{kind}") == pytest.approx(expected, rel=1e-6)


def test_another_strategy_goes_on_with_a_tied_teachers_student_in_bf16(tmp_path):
    folder, tied = stages.corpus(tmp_path), tiny.teacher_folder(tmp_path / "tied", tied=True)
    settings = {"precision": "bf16-true"}
    first = stages.keys(folder, tied, "align", "run", strategy="ddp", **settings)
    then = first | {"train.strategy": "fsdp"}
    out, _ = run(folder, [{"keys": first, "stop": [0, 6], "goes_on": True}, {"keys": then}])
    assert f"going on after step 7 of {stages.STEPS}" in out


def test_a_process_that_never_joins_is_not_waited_for(folder, teacher):
    keys = stages.keys(folder, teacher, "align", "absent")
    began = time.monotonic()
    _, err = run(folder, [{"keys": keys, "absent": 1}], code=2)
    assert time.monotonic() - began < SOON_S
    assert "ended with code 3 before all had joined: mend what it told above" in err


def test_the_others_do_not_wait_for_the_one_that_started_them(folder, teacher):
    first = start(folder, [{"keys": stages.keys(folder, teacher, "align", "orphan")}])
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    while not (started := children.read_text().split()) and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    began = time.monotonic()
    _, err = first.communicate(timeout=AT_MOST_S)  # until the others have closed its pipes too
    assert started
    assert time.monotonic() - began < SOON_S
    assert "the process that started this one is gone" in err


def test_an_error_that_one_process_has_ends_all(folder, teacher):
    keys = stages.keys(folder, teacher, "align", "one-raises")
    _, err = run(folder, [{"keys": keys, "raises": [1, 3]}], code=2)
    assert "radlads: process 1 of 2: a user's error" in err
    assert "Traceback" not in err


def test_an_error_that_all_have_is_told_once(folder, teacher):
    settings = {"strategy": "fsdp", "optimizer": "muon"}
    _, err = run(folder, [{"keys": stages.keys(folder, teacher, "align", "all-raise", **settings)}], code=2)
    assert err.count("radlads: ") == 1
    assert "train.optimizer muon needs whole matrices to update" in err and "set train.strategy ddp" in err


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_nodes_over_loopback_are_one_run(folder, teacher):
    keys = stages.keys(folder, teacher, "align", "nodes", devices=1, num_nodes=2)
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [start(folder, [{"keys": keys}], NODE_RANK=str(rank), **known) for rank in range(2)]
    for node in nodes:
        out, err = node.communicate(timeout=AT_MOST_S)
        assert node.returncode == 0, (out, err)
    assert_same_curve(folder, "nodes")


def test_slurms_tasks_are_one_run(folder, teacher):
    keys = stages.keys(folder, teacher, "align", "slurm")
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    known |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "align"}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    tasks = [start(folder, [{"keys": keys}], **known, **rank) for rank in ranks]
    for task in tasks:
        out, err = task.communicate(timeout=AT_MOST_S)
        assert task.returncode == 0, (out, err)
    assert_same_curve(folder, "slurm")


def test_torchrun_starts_the_processes_of_the_command(folder, teacher):
    keys = stages.keys(folder, teacher, "align", "torchrun", strategy="fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()]
    options = [f"--{key}={value}" for key, value in keys.items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "radlads.cli", "train", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=AT_MOST_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_same_curve(folder, "torchrun")


def test_what_is_missing_for_more_processes_is_said(folder, teacher, monkeypatch):
    def train(**settings):
        return load_config([], stages.keys(folder, teacher, "align", "x", **settings)).train

    with pytest.raises(ValueError, match="4 processes, but 1 runs: use radlads train"):
        check_processes(train(devices=2, num_nodes=2), ALONE)
    with (
        pytest.raises(ValueError, match=r"train.devices is -1, all GPUs, but train\.accelerator is no GPU"),
        joined(train(devices=-1)),
    ):
        pass
    for present, message in ((0, "no CUDA GPU is here: set --train.accelerator cpu"), (2, "set --train.devices 2")):
        monkeypatch.setattr("torch.cuda.device_count", lambda present=present: present)
        with pytest.raises(ValueError, match=message), joined(train(devices=8, accelerator="gpu")):
            pass
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match=r"MASTER_ADDR is not set: start the command by torchrun or srun"),
        joined(train(num_nodes=2)),
    ):
        pass
    with joined(train(devices=1)) as processes:
        assert processes == ALONE
