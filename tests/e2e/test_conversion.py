"""Whole conversions of a tiny teacher: what they leave behind, and that killing one in the middle loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.recipes.conversion_folder import only_process_in

SMALL = ["--set", "model.ctx_len=32", "--set", "train.my_exit_tokens=1280", "--set", "train.micro_bsz=4"]
SMALL += ["--set", "train.heldout_every_steps=5", "--set", "train.heldout_tokens=640", "--recipe", "paper"]
STAGES = ("align", "distill", "extend")


def command(teacher, corpus_folder, out, *more):
    data = ["--data", corpus_folder / "train", "--heldout-data", corpus_folder / "heldout"]
    return [str(word) for word in ["demo", "--teacher", teacher, *data, "--out", out, *SMALL, *more]]


@pytest.fixture(scope="module")
def finished(teacher, corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion") / "run"
    assert main(command(teacher, corpus_folder, out)) == 0
    return out


def test_the_summary_has_every_number(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for row in ("teacher", "setup", *STAGES):
        assert {"loss", "kl", "top1"} <= summary[row].keys()
    assert all(summary[stage]["tokens"] == 1280 and summary[stage]["seconds"] > 0 for stage in STAGES)
    assert summary["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert summary["teacher"]["top1"] == 1
    assert all(
        summary["decode_ms"][model][position] > 0 for model in ("student", "teacher") for position in ("100", "8000")
    )
    sizes = summary["bytes"]
    assert sizes["student"]["1024"] == sizes["student"]["65536"] == 3 * 4 * 4 * 16 * 16
    assert sizes["teacher"] == {str(n): 3 * 2 * 2 * 16 * 2 * n for n in (1024, 8192, 65536)}
    gap = (summary["setup"]["loss"] - summary["extend"]["loss"]) / (
        summary["setup"]["loss"] - summary["teacher"]["loss"]
    )
    assert summary["gap_closed"] == pytest.approx(gap)
    assert summary["reload_max_abs_diff"] == 0
    assert summary["seconds"] > 0
    assert summary["peak_rss_gb"] > 0.1


def test_the_folder_holds_what_is_promised(finished):
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    for number, stage in enumerate(STAGES, start=1):
        assert (finished / f"{number}-{stage}" / "manifest.json").is_file()
    assert not list(finished.glob("*.partial"))
    manifests = [
        json.loads((finished / f"{n}-{s}" / "manifest.json").read_text()) for n, s in enumerate(STAGES, start=1)
    ]
    assert manifests[2]["parent"].startswith("2-distill sha256:")


def test_the_export_is_the_last_stage_with_the_teachers_tokenizer(finished, teacher):
    tokens = torch.randint(256, (1, 20))
    student, exported = load_model(finished / "3-extend"), load_model(finished / "hf")
    assert torch.equal(student(tokens).logits, exported(tokens).logits)
    assert (finished / "hf" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(finished / "hf").decode([65, 66])


def test_all_files_of_a_conversion_can_be_verified(finished, capsys):
    assert main(["verify", str(finished)]) == 0
    said = capsys.readouterr().out
    records = [f"{n}-{s}/manifest.json" for n, s in enumerate(STAGES, start=1)] + ["hf/checksums.json"]
    for record in [*records, "teacher.checksums.json"]:
        assert f"{finished}/{record}: all " in said


def test_a_finished_conversion_is_shown_again_and_another_refused(finished, teacher, corpus_folder, capsys):
    before = (finished / "summary.json").read_bytes()
    assert main(command(teacher, corpus_folder, finished)) == 0
    assert (finished / "summary.json").read_bytes() == before
    capsys.readouterr()
    assert main(command(teacher, corpus_folder, finished, "--mixer", "rad_rwkv6")) == 2
    said = capsys.readouterr().err
    assert "holds another conversion (different: mixer, stages): " in said
    assert "model.tmix is 'rad_rwkv7' there and 'rad_rwkv6' here; " in said


def test_two_processes_do_not_share_a_folder(finished, teacher, corpus_folder, capsys):
    with only_process_in(finished):
        assert main(command(teacher, corpus_folder, finished)) == 2
    assert "another process is converting into" in capsys.readouterr().err


@pytest.mark.parametrize("mixer", [["rad_rwkv6"], ["rad_rwkv7", "--variant", "group_norm"]])
def test_the_other_mixers_convert_too(teacher, corpus_folder, tmp_path, mixer):
    assert main(command(teacher, corpus_folder, tmp_path / "run", "--mixer", *mixer)) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reload_max_abs_diff"] == 0


def test_a_tied_teachers_student_ends_tied_where_asked(corpus_folder, tmp_path):
    tied = tiny.teacher_folder(tmp_path / "tied", tied=True)
    assert main(command(tied, corpus_folder, tmp_path / "run", "--retie")) == 0
    exported = load_model(tmp_path / "run" / "hf")
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["retied"]["loss"] > 0 and summary["reload_max_abs_diff"] == 0
    assert not load_model(tmp_path / "run" / "3-extend").config.tie_word_embeddings


@pytest.mark.parametrize(
    "moment",
    ["1-align.partial/metrics.csv", "hf.partial"],  # amid a stage: test_kill.py
)
def test_killed_and_started_again_it_ends_as_if_never_killed(finished, teacher, corpus_folder, tmp_path, moment):
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "radlads.cli", *command(teacher, corpus_folder, out)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / moment).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    assert main(command(teacher, corpus_folder, out)) == 0
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (finished, out))
    assert all(first[stage]["loss"] == second[stage]["loss"] for stage in STAGES)
