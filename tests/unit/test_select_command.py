"""`radlads select`: what it writes and says, and what it refuses before any search."""

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.kept_layers import kept_student
from radlads.convert.student import build_teacher
from radlads.recipes import selecting
from radlads.recipes.single_stage import train_stage
from radlads.recipes.teacher_record import record_teacher, teacher_checksums
from radlads.report.page import write_page
from radlads.report.run_folder import read_run


@pytest.fixture(scope="module")
def aligned(teacher, corpus_folder, tmp_path_factory):
    """A finished align stage."""
    keys = {"train.teacher.hf_path": str(teacher), "train.proj_dir": str(tmp_path_factory.mktemp("aligned"))}
    keys["train.validation_data_file"] = str(corpus_folder / "heldout")
    return train_stage(tiny.stage_config(corpus_folder, "align", **keys), tiny.Silent()).folder


@pytest.fixture
def run(aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "run")
    return tmp_path / "run"


def select(run, *words, keep=1):
    fast = ["--device", "cpu", "--tokens", "640", "--ctx-len", "128", "--samples", "6"]
    return main(["select", str(run), "--keep", str(keep), *fast, *map(str, words)])


def failing(capsys, run, *words, keep=1):
    assert select(run, *words, keep=keep) == 2
    error = capsys.readouterr().err
    assert error.startswith("radlads: ") and error.count("\n") == 1
    assert not (run / "layers.json").exists()
    return error.removeprefix("radlads: ").strip()


def test_the_file_the_plot_and_the_lines(run, capsys, teacher, corpus_folder):
    assert select(run, keep=2) == 0
    record = json.loads((run / "layers.json").read_text())
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"student: {run}, after align"
    assert said[1] == f"teacher: {teacher}"
    assert said[2] == f"choosing 2 of 3 layers on 640 tokens of {corpus_folder / 'heldout'}, windows of 128"
    assert said[-1] == f"--model.softmax_layers {','.join(map(str, record['layers']))}"
    # A pass to trace each round; in the first 3 + 2 + 1 blocks for each layer; then two, beside the one chosen
    assert any("passes of the student here" in line for line in said)
    assert (run / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert record["order"] == [each["chosen"] for each in record["rounds"]]
    assert (record["keep"], record["by"], record["student_stage"]) == (2, "kl", "after align")
    assert [len(row["layers"]) for row in record["curve"]] == [0, 1, 2]
    assert [row["layers"] for row in record["uniform"]] == [[2], [0, 2]]


def test_what_is_measured_is_what_a_model_with_these_layers_has(run, teacher, capsys):
    assert select(run, "--by", "recalled", "--out", run.parent / "x.json") == 0
    record = json.loads((run.parent / "x.json").read_text())
    kept = kept_student(load_model(run), build_teacher(open_teacher(teacher)), record["layers"])
    export(kept, teacher, run.parent / "kept")
    capsys.readouterr()
    command = ["--teacher", teacher, "--by", "recalled", "--text", corpus(run), "--out", run.parent / "y.json"]
    assert select(run.parent / "kept", *command) == 0
    again = json.loads((run.parent / "y.json").read_text())
    assert again["curve"][0]["recalled"] == pytest.approx(record["curve"][1]["recalled"], abs=1e-6)
    assert "a model's folder that names no stage" in capsys.readouterr().out


def corpus(run):
    return read_run(run).stages[0].config["train"]["validation_data_file"]


def test_needles(run, capsys):
    assert select(run, "--by", "needle", "--needle-tokens", "150") == 0
    record = json.loads((run / "layers.json").read_text())
    assert (record["num_prompts"], record["needle_tokens"]) == (6, 150)
    assert set(record["curve"][0]) == {"layers", "needle", "answer_loss"}
    said = capsys.readouterr().out
    assert "6 prompts of 150 tokens, facts within " in said
    assert not any(row["needle"] for row in record["curve"])
    assert "no needle was found, so the loss of the answers alone decided: give a shorter --needle-tokens" in said


def test_text_without_a_run_is_this_pythons(run, teacher, tmp_path, capsys):
    export(load_model(run), teacher, tmp_path / "hf")
    assert select(tmp_path / "hf", "--teacher", teacher, "--out", tmp_path / "l.json") == 0
    assert "640 tokens of held-out sources of the running Python" in capsys.readouterr().out


def test_of_a_folder_of_stages_the_aligned_student_is_taken(run, capsys):
    (run.parent / "all").mkdir()
    shutil.move(run, run.parent / "all" / "1")
    other = run.parent / "all" / "2"
    shutil.copytree(run.parent / "all" / "1", other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"stage": "distill"}))
    assert select(run.parent / "all") == 0
    assert f"student: {run.parent / 'all' / '1'}, after align" in capsys.readouterr().out
    assert select(other) == 0
    assert f"student: {other}, after distill, whose other layers have learnt without" in capsys.readouterr().out


def test_the_report_shows_what_was_found(run):
    assert select(run, keep=2) == 0
    page = write_page(run).read_text()
    record = json.loads((run / "layers.json").read_text())
    assert "Which layers to keep as softmax" in page and "student: none." in page and "640 tokens of" in page
    assert f"<td>{record['curve'][2]['kl']:.4f}</td>" in page and "uniform spacing" in page
    assert (run / "plots" / "softmax-layers.png").is_file()


def test_a_report_without_a_selection_has_no_such_section(run):
    assert "keep as softmax" not in write_page(run).read_text()


def test_a_damaged_file_is_named_by_the_report(run):
    (run / "layers.json").write_text(
        '{"layers": [1], "text": "", "by": "kl", "curve": [], "uniform": [], "rounds": []}'
    )
    with pytest.raises(ValueError, match=r"layers\.json lacks list index out of range or is of another version"):
        write_page(run)


@pytest.mark.parametrize(
    ("words", "keep", "message"),
    [
        ([], 0, "--keep must be 1 or more, not 0"),
        ([], 3, "--keep is 3, but {run} has 3 layers that are not softmax already, and one of them must stay so: give"),
        (["--by", "recalled", "--ctx-len", 64], 1, "--by recalled needs windows of more than 64 tokens, as only pairs"),
        (["--ctx-len", 40000], 1, "--ctx-len is 40000, but the teacher knows 32768 positions: give fewer"),
        (["--by", "needle", "--needle-tokens", 40000], 1, "--needle-tokens is 40000, but the teacher knows 32768"),
        (["--by", "needle", "--needle-tokens", 20], 1, "20 tokens are too few for a needle prompt, which takes"),
        (["--ctx-len", 30000], 1, "{heldout} holds 20,000 tokens, less than one window of 30,001: give more text"),
        (
            ["--out", "layers.png"],
            1,
            "layers.png is the name of the plot, which is written beside the file: give --out",
        ),
        (["--out", "."], 1, ". is a folder: give --out a file's name"),
        (["--out", "nowhere/layers.json"], 1, "nowhere is not a folder: make it first, or choose another --out"),
        (["--tokens", 0], 1, "--tokens must be 1 or more, not 0"),
        (["--text", "no.txt"], 1, "no.txt: No such file or directory"),
    ],
)
def test_requests_that_cannot_be_met(run, capsys, corpus_folder, words, keep, message):
    expected = message.format(run=run, heldout=corpus_folder / "heldout")
    assert failing(capsys, run, *words, keep=keep).startswith(expected)


def test_a_file_that_is_there_is_not_written_over(run, capsys):
    assert select(run) == 0
    before = (run / "layers.json").read_bytes()
    capsys.readouterr()
    assert select(run) == 2
    assert f"{run / 'layers.json'} exists already: remove it, or choose another --out" in capsys.readouterr().err
    assert (run / "layers.json").read_bytes() == before


def test_a_file_that_a_stage_was_made_with_is_not_to_be_removed(run, capsys):
    assert select(run) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["sha256"]["layers.json"] = ""
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert select(run) == 2
    said = f"{run / 'layers.json'} belongs to the stage, which selected its layers by it: choose another --out"
    assert said in capsys.readouterr().err


def test_what_was_found_is_printed_before_it_is_written(run, capsys, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(selecting, "write_text", full)
    assert select(run) == 2
    said = capsys.readouterr()
    assert "rank  layer" in said.out and "No space left on device" in said.err


def test_a_full_gpu_is_told_what_takes_less(run, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(selecting, "search", full)
    assert failing(capsys, run).endswith("is kept of a batch: give a shorter --ctx-len, or --device cpu")
    assert failing(capsys, run, "--by", "needle", "--needle-tokens", "150").endswith(
        "is kept of a batch: give a shorter --needle-tokens, or --device cpu"
    )


@pytest.fixture
def other(tmp_path):
    """A teacher of the same sizes, with another embedding."""
    folder = tiny.teacher_folder(tmp_path / "other")
    weights = build_teacher(open_teacher(folder))
    weights.model.embed_tokens.weight.data.add_(0.1)
    save_file(dict(weights.state_dict()), folder / "model.safetensors")
    return folder


def test_another_teacher_than_the_aligned_ones_is_refused(run, other, capsys):
    capsys.readouterr()
    said = failing(capsys, run, "--teacher", other)
    assert said == (
        f"{other} is not the teacher that {run} was aligned with, as its embedding is another: name that one with "
        "--teacher"
    )


@pytest.mark.parametrize("layers", ["auto:1", "2"])
def test_distill_takes_no_attention_of_another_teacher(run, other, corpus_folder, tmp_path, layers):
    keys = {"train.teacher.hf_path": str(other), "train.load_model": str(run), "model.softmax_layers": layers}
    config = tiny.stage_config(corpus_folder, "distill", **keys, **{"train.proj_dir": str(tmp_path)})
    said = f"{other} is not the teacher that {run} was aligned with, as its embedding is another: name that one in "
    with pytest.raises(ValueError, match=f"^{re.escape(said)}train.teacher.hf_path$"):
        train_stage(config, tiny.Silent())


def test_another_teacher_than_the_conversions_is_refused(run, teacher, tmp_path, capsys):
    record_teacher(run.parent, teacher_checksums(teacher))
    assert select(run) == 0
    (run / "layers.json").unlink()
    copy = shutil.copytree(teacher, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, copy / "model.safetensors")
    capsys.readouterr()
    said = failing(capsys, run, "--teacher", copy)
    record = run.parent / "teacher.checksums.json"
    assert said == f"{copy} is not the teacher that {record} describes: give that one as --teacher"


def test_a_teacher_of_other_sizes_is_refused(run, tmp_path, capsys):
    other = tiny.teacher_folder(tmp_path / "other", heads=2)
    capsys.readouterr()
    said = failing(capsys, run, "--teacher", other)
    assert said.startswith(f"the num_attention_heads of {other} is 2, and 4 in {run}: name the student's own teacher")


def test_a_folder_that_names_no_teacher_wants_one(run, teacher, tmp_path, capsys):
    export(load_model(run), teacher, tmp_path / "hf")
    said = failing(capsys, tmp_path / "hf")
    assert said == f"{tmp_path / 'hf'} does not say who its teacher was: name its folder with --teacher"


def test_a_folder_that_is_no_student(tmp_path, teacher, capsys):
    assert "holds no finished stage" in failing(capsys, tmp_path)
    assert select(teacher, "--teacher", teacher) == 2
    assert f"every layer of {teacher} is softmax already: name a student's folder" in capsys.readouterr().err
