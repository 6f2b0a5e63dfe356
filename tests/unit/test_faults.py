"""What goes wrong while a stage trains: a sentence, the last good checkpoint, and the same end once it is mended."""

import errno
import multiprocessing
import os
import shutil
import subprocess

import pytest
import tiny
import torch

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.distill.logits import build_stage
from radlads.train.callbacks import Progress
from radlads.train.checkpoints import snapshots
from radlads.train.diagnosis import first_not_finite
from radlads.train.fit import run_stage


def run(teacher, data, folder, **overrides):
    keys = {"train.checkpoint_every_steps": 1, "train.my_exit_tokens": 16 * 4 * 4} | overrides
    config = tiny.stage_config(data, "align", **keys)
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")


@pytest.fixture(scope="module")
def straight(teacher, corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(teacher, corpus_folder, folder)
    return folder


def assert_goes_on_to_the_same_end(teacher, data, folder, straight):
    run(teacher, data, folder)
    for name in ("model.safetensors", "metrics.csv"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


def kept(folder):
    """What lies beside the stage's other files of its checkpoints, whole or not."""
    return sorted(path.name for path in (folder.with_name("run.partial") / "checkpoints").iterdir())


def after_step(monkeypatch, step, action):
    """Do something once, after a step."""
    earlier = Progress.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *rest):
        earlier(self, trainer, pl_module, *rest)
        if pl_module.steps_done == step:
            action()

    monkeypatch.setattr(Progress, "on_train_batch_end", on_train_batch_end)


def test_a_full_disk_leaves_the_checkpoint_before(teacher, corpus_folder, tmp_path, straight, monkeypatch):
    write, calls = snapshots.write_safetensors, iter(range(1, 9))

    def write_twice(tensors, names, path):
        write(tensors, names, path)
        if next(calls) == 3:
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "write_safetensors", write_twice)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(teacher, corpus_folder, tmp_path / "run")
    assert caught.value.filename.endswith("run.partial/checkpoints/step-000003")
    assert kept(tmp_path / "run") == ["step-000001", "step-000002"]
    assert_goes_on_to_the_same_end(teacher, corpus_folder, tmp_path / "run", straight)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_file_system_that_is_full_leaves_the_checkpoint_before(teacher, corpus_folder, tmp_path, straight):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            run(teacher, corpus_folder, small / "run")
        assert all(name.removeprefix("step-").isdecimal() for name in kept(small / "run"))
        newest = snapshots.checkpoints_in(small / "run.partial")[-1]
        assert snapshots.fault_of(newest) is None
        shutil.copytree(small / "run.partial", tmp_path / "run.partial")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert_goes_on_to_the_same_end(teacher, corpus_folder, tmp_path / "run", straight)


@pytest.mark.parametrize(("harm", "said"), [("cut", "has 100 bytes now, and had 40000"), ("gone", "is gone")])
def test_a_corpus_that_shrinks_or_goes_ends_the_run_by_a_sentence(
    teacher, corpus_folder, tmp_path, straight, monkeypatch, harm, said
):
    shutil.copytree(corpus_folder, tmp_path / "data")
    path = tmp_path / "data" / "train.bin"
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda: os.truncate(path, 100) if harm == "cut" else path.unlink())
        with pytest.raises(ValueError, match=rf"train\.bin {said}.*put it back as it was"):
            run(teacher, tmp_path / "data", tmp_path / "run")
    shutil.copy(corpus_folder / "train.bin", path)
    assert_goes_on_to_the_same_end(teacher, tmp_path / "data", tmp_path / "run", straight)


def test_a_corpus_that_is_overwritten_ends_the_run_by_a_sentence(teacher, corpus_folder, tmp_path, monkeypatch):
    shutil.copytree(corpus_folder, tmp_path / "data")
    path = tmp_path / "data" / "train.bin"
    after_step(monkeypatch, 2, lambda: path.write_bytes(bytes(path.stat().st_size)))
    with pytest.raises(ValueError, match=r"train\.bin holds other tokens now than when the stage began: put it back"):
        run(teacher, tmp_path / "data", tmp_path / "run")


def test_a_corpus_that_is_written_as_it_was_is_read_on(teacher, corpus_folder, tmp_path, straight, monkeypatch):
    shutil.copytree(corpus_folder, tmp_path / "data")
    path = tmp_path / "data" / "train.bin"
    after_step(monkeypatch, 2, lambda: os.utime(path, ns=(0, 0)))
    run(teacher, tmp_path / "data", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_loss_that_is_nan_leaves_the_last_good_checkpoint(teacher, corpus_folder, tmp_path, monkeypatch):
    poisoned = []

    def poison(module, inputs, output):
        return (output[0] * float("nan"), *output[1:]) if poisoned else output

    build = build_student

    def built(source, model):
        student, rows = build(source, model)
        student.model.layers[1].self_attn.register_forward_hook(poison)
        return student, rows

    monkeypatch.setattr(f"{__name__}.build_student", built)
    after_step(monkeypatch, 2, lambda: poisoned.append(True))
    first = r"the first tensor that is not finite is the output of model\.layers\.1\.self_attn: lower"
    with pytest.raises(ValueError, match=rf"loss of align \(layer_1\) is nan at step 3, and {first}"):
        run(teacher, corpus_folder, tmp_path / "run")
    assert kept(tmp_path / "run") == ["step-000001", "step-000002"]
    assert all(snapshots.fault_of(path) is None for path in snapshots.checkpoints_in(tmp_path / "run.partial"))


def test_no_worker_processes_are_there_to_be_killed(teacher, corpus_folder, tmp_path, monkeypatch):
    children = []
    after_step(monkeypatch, 2, lambda: children.append(multiprocessing.active_children()))
    run(teacher, corpus_folder, tmp_path / "run", **{"train.heldout_tail_tokens": 64, "train.heldout_every_steps": 1})
    assert children == [[]]


@pytest.fixture
def models(teacher, corpus_folder):
    config = tiny.stage_config(corpus_folder, "distill")
    source = open_teacher(teacher)
    student, frozen = build_student(source, config.model)[0], build_teacher(source)
    return build_stage(config.train), student, frozen, [torch.arange(34).reshape(2, 17)]


def times(factor):
    return lambda module, inputs, output: output * factor


def test_the_first_tensor_that_is_not_finite_is_named(models):
    _, student, teacher, _ = models
    assert first_not_finite(*models) == "though no tensor was when the batch was computed again"
    for owner, model in (("", student), ("the teacher's ", teacher)):
        for name in ("model.layers.2.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"):
            hook = model.get_submodule(name).register_forward_hook(times(float("inf")))
            assert first_not_finite(*models).endswith(f"is the output of {owner}{name}")
            hook.remove()
    hook = student.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert first_not_finite(*models).endswith("is the gradient of model.layers.1.mlp.up_proj.weight")
    hook.remove()
    student.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("inf")
    assert first_not_finite(*models).endswith("is the weight model.layers.2.mlp.up_proj.weight")
    assert all(parameter.grad is None for parameter in student.parameters())
