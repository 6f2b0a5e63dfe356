"""Where models are built: on the device that they train on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from radlads.convert.blueprint import Blueprint
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import student_blueprint, teacher_blueprint
from radlads.train.engines import fsdp, sharding, zero
from radlads.train.hardware import only_device
from radlads.train.placement import build_models
from radlads.train.processes.group import ALONE, Processes


def blueprints(teacher, config):
    source = open_teacher(teacher)
    return student_blueprint(source, config.model), teacher_blueprint(source)


def test_a_process_that_is_alone_builds_on_the_gpu_it_trains_on(tmp_path, monkeypatch):
    train = tiny.stage_config(tmp_path, "align").train
    for present, wanted in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present)
        for accelerator in ("auto", "gpu", "cuda"):
            assert only_device(replace(train, accelerator=accelerator)) == torch.device(wanted)
        assert only_device(replace(train, accelerator="cpu")) == torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true"])
def test_models_are_built_as_they_train(teacher, tmp_path, precision):
    config = tiny.stage_config(tmp_path, "distill", **{"train.precision": precision})
    models = build_models(config, *blueprints(teacher, config), ALONE)
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {each.dtype for model in (models.student, models.teacher) for each in model.parameters()} == {wanted}
    assert not models.student.training
    assert not any(parameter.requires_grad for parameter in models.teacher.parameters())


def test_they_are_built_on_the_processs_device(teacher, tmp_path, monkeypatch):
    asked = []

    def build(blueprint, **where):
        asked.append(where)
        return SimpleNamespace(eval=lambda: SimpleNamespace(requires_grad_=lambda wanted: None)), None

    monkeypatch.setattr(Blueprint, "build", build)
    gpu = torch.device("cuda", 1)
    for stage, settings in (
        ("distill", {}),
        ("distill", {"teacher_precision": "fp8"}),
        ("extend", {"teacher.kl_weight": 0.0}),
        ("extend", {"teacher.kl_weight": 0.0, "heldout_tail_tokens": 16}),
    ):
        config = tiny.stage_config(tmp_path, stage, **{f"train.{key}": value for key, value in settings.items()})
        build_models(config, *blueprints(teacher, config), Processes(1, 2, gpu))
    there = {"dtype": torch.float32, "device": gpu}
    students, teachers = asked[::2], asked[1::2]
    assert students == [there] * 4
    assert teachers == [there, {}, {}, there], "one to be rounded, or not run, is on the CPU"


def test_deepspeeds_are_in_rows_but_for_a_teacher_that_is_not_run(teacher, tmp_path, monkeypatch):
    asked = []

    def record(kind):
        model = SimpleNamespace(eval=lambda: SimpleNamespace(requires_grad_=lambda wanted: None))
        return lambda *arguments, **keywords: (asked.append(kind) or model, None)

    monkeypatch.setattr(Blueprint, "build", record("whole"))
    monkeypatch.setattr(zero, "build_in_rows", record("rows"))
    monkeypatch.setattr(zero.Zero, "check", lambda *arguments: None)
    monkeypatch.setattr(zero, "init_device_mesh", lambda *arguments: None)
    for kl_weight in (0.5, 0.0):
        keys = {"train.strategy": "deepspeed_stage_3", "train.teacher.kl_weight": kl_weight}
        config = tiny.stage_config(tmp_path, "extend", **keys)
        build_models(config, *blueprints(teacher, config), Processes(0, 2, torch.device("cuda", 0)))
    assert asked == ["rows", "rows", "rows", "whole"]


@pytest.mark.parametrize(
    ("settings", "processes", "advice"),
    [
        (
            {"precision": "bf16"},
            ALONE,
            r"set train.precision bf16-true \(under ddp or fsdp\), or set train.strategy fsdp on several GPUs$",
        ),
        ({"precision": "bf16-true"}, ALONE, "set train.strategy fsdp on several GPUs$"),
        (
            {"precision": "bf16-true", "teacher_precision": "fp8"},
            ALONE,
            "set train.strategy fsdp and train.teacher_precision same on several GPUs$",
        ),
        (
            {"precision": "bf16-true", "strategy": "fsdp"},
            Processes(0, 2, torch.device("cuda", 0)),
            "take more GPUs$",
        ),
    ],
)
def test_models_that_do_not_fit_are_one_sentence(teacher, tmp_path, monkeypatch, settings, processes, advice):
    def build(*arguments, **keywords):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(Blueprint, "build", build)
    monkeypatch.setattr(sharding, "build_sharded", build)
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *arguments: None)
    config = tiny.stage_config(tmp_path, "distill", **{f"train.{key}": value for key, value in settings.items()})
    with pytest.raises(ValueError, match=f"the distill stage's models do not fit into the GPU's 80 GB: {advice}"):
        build_models(config, *blueprints(teacher, config), processes)
