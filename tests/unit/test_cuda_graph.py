"""When a stage's passes are recorded as a CUDA graph, and what is said where they cannot be."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from radlads.config.schema import Config, TrainConfig
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.distill.logits import build_stage
from radlads.distill.stage import is_trainable
from radlads.model import registry
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.train.cuda_graph import records_graph
from radlads.train.engines.table import engine_for
from radlads.train.hardware import check_hardware, out_of_memory
from radlads.train.processes.group import ALONE

NUMBERS = {"align": 1, "distill": 2, "extend": -1}


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    config = tiny.stage_config(tmp_path_factory.mktemp("student"), "align")
    return build_student(open_teacher(teacher), config.model)[0]


@pytest.fixture
def memory(monkeypatch):
    """Sets the GPU's memory, in bytes."""

    def has(total):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))

    has(1e12)
    return has


def records(student, kind, *, compiled=True, **settings):
    train = TrainConfig(attention_distillation_stage=NUMBERS[kind], **settings)
    stage = build_stage(train, end_ids=[0])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, student, stage.trainable))
    return records_graph(train, stage, student, compiled=compiled)


def test_gradients_of_a_tenth_of_the_memory_are_small(student, memory):
    gradients = 4 * sum(parameter.numel() for parameter in student.parameters())
    memory(10 * gradients)
    assert records(student, "distill")
    memory(10 * gradients - 10)
    assert not records(student, "distill")
    assert not records(student, "extend")
    assert records(student, "extend", trainable="decay")
    assert records(student, "align")


def test_what_the_host_counts_is_not_recorded(student, memory):
    assert not records(student, "distill", mask_labels_at_eos=1)
    assert records(student, "align", mask_labels_at_eos=1)
    assert not records(student, "align", reset_state_at_eos=1)


def test_blocks_that_are_not_compiled_are_recorded_on_request(student, memory):
    assert not records(student, "align", compiled=False)
    assert records(student, "align", compiled=False, cuda_graphs="always")
    assert not records(student, "align", cuda_graphs="never")


def test_a_users_own_mixer_is_recorded_on_request_alone(student, memory, monkeypatch):
    monkeypatch.setitem(registry.TIME_MIXERS, "mine", type("TMix_mine", (RadRwkv7,), {}))
    monkeypatch.setattr(student.config, "time_mixers", ["mine"] * len(student.config.time_mixers))
    assert not records(student, "align")
    assert records(student, "align", cuda_graphs="always")


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("align", {"reset_state_at_eos": 1}),
        ("distill", {"mask_labels_at_eos": 1}),
        ("align", {"strategy": "fsdp", "devices": 2}),
        ("distill", {"strategy": "deepspeed_stage_1", "num_nodes": 2}),
    ],
)
def test_always_is_refused_where_nothing_can_be_recorded(kind, setting):
    with pytest.raises(ValueError, match=rf"'auto' or 'never' with train\.{next(iter(setting))}"):
        TrainConfig(attention_distillation_stage=NUMBERS[kind], cuda_graphs="always", **setting)


def test_always_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for accelerator in ("cpu", "auto"):
        with pytest.raises(ValueError, match="'always', but the stage runs on no CUDA GPU"):
            check_hardware(TrainConfig(cuda_graphs="always", accelerator=accelerator, precision="fp32"))


def test_a_graph_is_one_thing_to_lower_when_memory_is_short(memory):
    config = Config()
    engine = engine_for(config.train, ALONE)
    said = [out_of_memory(config, engine, torch.device("cuda"), graphed=graphed) for graphed in (True, False)]
    assert ["cuda_graphs never" in sentence for sentence in said] == [True, False]
