"""What a row of metrics says of speed, arithmetic and memory, and where it is written."""

import csv

import pytest
import tiny
import torch

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.distill.arithmetic import train_flops
from radlads.distill.logits import build_stage
from radlads.distill.stage import is_trainable
from radlads.train.fit import run_stage
from radlads.train.logging import throughput
from radlads.train.logging.gpus import GPUS, gpu_called
from radlads.train.logging.throughput import Throughput, peak_flop_per_s, stage_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI325X OAM", "mi325x"),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_device(name, kind):
    assert gpu_called(name) is GPUS[kind]


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 D", ""]
)
def test_a_gpu_that_is_not_in_the_table_is_no_other(name):
    assert gpu_called(name) is None


def test_speed_is_of_the_tokens_and_seconds_since_the_last_row():
    now = [10.0]
    counter = Throughput(100.0, CPU, clock=lambda: now[0])
    counter.begin(1000)
    now[0] = 12.0
    assert counter.since_last_row(5000) == {"tokens_per_s": 2000.0}
    now[0] = 13.0
    assert counter.since_last_row(5500) == {"tokens_per_s": 500.0}


@pytest.mark.parametrize(("flops", "mfu"), [(1e9, {"mfu": 0.25}), (None, {})])
def test_mfu_is_a_share_of_all_devices_peak_or_nothing(monkeypatch, flops, mfu):
    monkeypatch.setattr(throughput, "peak_flop_per_s", lambda device: 1e12)
    now = [0.0]
    counter = Throughput(flops, CPU, num_devices=2, clock=lambda: now[0])
    now[0] = 2.0
    assert counter.since_last_row(1000) == {"tokens_per_s": 500.0} | mfu


def test_the_peak_is_the_gpus_own_or_unknown(monkeypatch):
    assert peak_flop_per_s(CPU) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flop_per_s(torch.device("cuda")) == peak


def flops_of(teacher_folder, stage, **keys):
    config = tiny.stage_config(teacher_folder, stage, **keys)
    source = open_teacher(teacher_folder)
    student, teacher = build_student(source, config.model)[0], build_teacher(source)
    built = build_stage(config.train)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, student, built.trainable))
    counted = {name: train_flops(name, student.config, teacher.config, 16) for name in ("align", "distill", "extend")}
    return stage_flops(built, student, teacher, 16), counted, student


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_a_stages_arithmetic_is_that_of_its_plan(teacher, stage):
    flops, counted, _ = flops_of(teacher, stage)
    assert flops == counted[stage]


def test_extending_with_a_teacher_costs_what_distilling_does(teacher):
    flops, counted, _ = flops_of(teacher, "extend", **{"train.teacher.hf_path": str(teacher)})
    assert flops == counted["distill"]


def test_matrices_that_do_not_train_need_no_gradient_of_theirs(teacher):
    flops, counted, _ = flops_of(teacher, "extend", **{"train.trainable": "mixer"})
    frozen = 3 * 3 * 64 * 96 + 64 * tiny.VOCAB
    assert counted["extend"] - flops == 2 * frozen


def test_a_mixer_of_ones_own_has_no_known_arithmetic(teacher):
    _, _, student = flops_of(teacher, "extend")
    student.config.time_mixers = ["mine", *student.config.time_mixers[1:]]
    config = tiny.stage_config(teacher, "extend")
    assert stage_flops(build_stage(config.train), student, None, 16) is None


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_hold_the_norms_and_what_differs_between_runs_lies_apart(teacher, corpus_folder, tmp_path):
    for stage, roles in (("align", {"mixer"}), ("distill", {"mixer", "rest"})):
        config = tiny.stage_config(corpus_folder, stage, **{"train.log_every_n_steps": 2})
        source, folder = open_teacher(teacher), tmp_path / stage
        student = build_student(source, config.model)[0]
        run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")
        for row in rows(folder / "metrics.csv"):
            parts = [float(row[f"grad_norm_{role}"]) for role in roles]
            assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(float(row["grad_norm"]), rel=1e-5)
            assert {name for name in row if name.startswith("grad_norm_")} == {f"grad_norm_{role}" for role in roles}
            assert "tokens_per_s" not in row
        speed = rows(folder / "speed.csv")
        assert [(row["optimizer_step"], row["tokens"]) for row in speed] == [("2.0", "128.0"), ("4.0", "256.0")]
        assert all(float(row["tokens_per_s"]) > 0 for row in speed)
        assert set(speed[0]) == {"optimizer_step", "tokens", "tokens_per_s"}  # a CPU has no peak that is known
