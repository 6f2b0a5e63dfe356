"""A stage that logs to Weights & Biases, for real but offline: what its files hold, going on, and what goes wrong."""

import csv
import json
import logging
import os
import signal
import struct
import sys
from pathlib import Path

import pytest
import tiny
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.recipes.single_stage import train_stage
from radlads.train.callbacks import Progress
from radlads.train.fit import run_stage
from radlads.train.logging.loggers import check_loggers
from radlads.train.stopping import Stopped


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": "", "CONFIG_DIR": "", "DATA_DIR": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value or str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


def run(teacher, data, folder, **overrides):
    keys = {"train.wandb": "trials", "train.my_exit_tokens": 16 * 4 * 4, "train.log_every_n_steps": 2} | overrides
    config = tiny.stage_config(data, "align", **keys)
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")


def records(path: Path):
    """The records of a run's .wandb file: a LevelDB log, in blocks of 32 kB, after a header of 7 bytes."""
    content, at, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # no place for a header
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def read(folder):
    """Name and id, configuration and logged rows of each W&B run that lies in a stage's folder, by time."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        of_run, config, rows = None, {}, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                of_run = (record.run.project, record.run.display_name, record.run.run_id)
            updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, ())
            config |= {item.key: json.loads(item.value_json) for item in updates}
            if kind == "history":
                rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        found.append((of_run, config, rows))
    return found


def written(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_metrics_and_configuration_are_in_the_files_of_an_offline_run(teacher, corpus_folder, tmp_path):
    heldout = {"train.validation_data_file": str(corpus_folder / "heldout"), "train.heldout_tokens": 64}
    run(teacher, corpus_folder, tmp_path / "first-try", **heldout)
    [(of_run, config, rows)] = read(tmp_path / "first-try")
    identity = json.loads((tmp_path / "first-try" / "wandb.json").read_text())
    assert of_run == ("trials", "first-try", identity["id"])
    assert config["train"]["lr_init"] == 1e-3 and config["model"]["tmix"] == "rad_rwkv7"
    expected = [
        metrics | speed
        for metrics, speed in zip(
            written(tmp_path / "first-try" / "metrics.csv"), written(tmp_path / "first-try" / "speed.csv"), strict=True
        )
    ]
    logged = [{name: row[name] for name in expected[0]} for row in rows if "loss" in row]
    assert logged == expected and {"grad_norm_mixer", "layer_2", "tokens_per_s"} <= expected[0].keys()
    assert [row["trainer/global_step"] for row in rows if "heldout_loss" in row] == [0, 4]
    assert wandb.run is None  # or the next stage would log to it


def test_a_run_that_goes_on_is_the_same_run_and_another_folders_is_another(
    teacher, corpus_folder, tmp_path, monkeypatch
):
    often = {"train.checkpoint_every_steps": 1, "train.log_every_n_steps": 1, "train.keep_checkpoints": 9}
    earlier = Progress.on_train_batch_end

    def terminated(self, trainer, pl_module, *rest):
        earlier(self, trainer, pl_module, *rest)
        if pl_module.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Progress, "on_train_batch_end", terminated)
        run(teacher, corpus_folder, tmp_path / "a", **often)
    checkpoint = tmp_path / "a.partial" / "checkpoints" / "step-000002"
    run(teacher, corpus_folder, tmp_path / "b", **often, **{"train.resume": str(checkpoint)})
    run(teacher, corpus_folder, tmp_path / "a", **often)
    first, second = read(tmp_path / "a")
    assert first[0] == second[0]
    assert [row["optimizer_step"] for row in first[2] + second[2]] == [1, 2, 3, 4]
    [other] = read(tmp_path / "b")
    assert other[0][:2] == ("trials", "b") and other[0][2] != first[0][2]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_training_goes_on_without_a_wandb_that_dies(teacher, corpus_folder, tmp_path, monkeypatch, caplog):
    def dead(self, *arguments, **keywords):
        raise ConnectionResetError("Connection lost")

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(wandb.Run, "log", dead)
        run(teacher, corpus_folder, tmp_path / "run")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("radlads")] == [
        "Weights & Biases has stopped logging (Connection lost); training goes on, and so do the other logs"
    ]
    assert len(written(tmp_path / "run" / "metrics.csv")) == 2


def test_without_the_package_one_sentence_says_so_before_models_are_read(corpus_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny.stage_config(corpus_folder, "align", **{"train.wandb": "trials", "train.load_model": "nowhere"})
    with pytest.raises(ValueError, match=r"not installed: pip install 'radlads\[wandb\]'"):
        train_stage(config, tiny.Silent())
    check_loggers(tiny.stage_config(corpus_folder, "align").train)


def test_who_is_not_logged_in_is_told_so(teacher, corpus_folder, tmp_path, monkeypatch):
    def refused(**keywords):
        raise wandb.errors.UsageError("No API key configured.\n Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ValueError, match=r"cannot be reached \(No API key configured\. Use.*set WANDB_MODE=offline"):
        run(teacher, corpus_folder, tmp_path / "run")
