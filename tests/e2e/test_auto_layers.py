"""model.softmax_layers auto:K and layers named after align, in single stages and whole conversions, and going on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.kept_layers import kept_student
from radlads.convert.student import build_teacher
from radlads.recipes import auto_layers, single_stage
from radlads.recipes.single_stage import train_stage
from radlads.train import checkpointing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def align(teacher, corpus_folder, tmp_path_factory):
    """Runs an align stage, with these layers to select."""

    def run(layers):
        console = tiny.Silent()
        folder = tmp_path_factory.mktemp("align")
        return train_stage(stage(teacher, corpus_folder, folder, "align", layers), console).folder

    return run


@pytest.fixture(scope="module")
def aligned(align):
    return align("auto:1")


def stage(teacher, corpus_folder, folder, name, layers, **keys):
    settings = {"train.teacher.hf_path": str(teacher), "train.proj_dir": str(folder), "model.softmax_layers": layers}
    settings |= {"train.proj_name": name, "train.validation_data_file": str(corpus_folder / "heldout")}
    settings |= {"train.heldout_tokens": 320, "train.checkpoint_every_steps": 1}
    return tiny.stage_config(corpus_folder, name, **(settings | keys))


def run(teacher, corpus_folder, folder, name, layers, start, **keys):
    console = tiny.Silent()
    config = stage(teacher, corpus_folder, folder, name, layers, **{"train.load_model": str(start)}, **keys)
    return train_stage(config, console).folder, console.lines


def layers_of(folder):
    return [layer for layer, name in enumerate(load_model(folder).config.time_mixers) if name == "qwen2"]


def recorded(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["softmax_layers"]


def metrics(folder):
    return (folder / "metrics.csv").read_text()


def test_align_keeps_no_layer_yet(aligned):
    assert layers_of(aligned) == [] and recorded(aligned) == "auto:1"
    assert not (aligned / "layers.json").exists()


def test_the_next_stage_begins_with_the_best_layer_and_the_one_after_takes_it(
    teacher, corpus_folder, aligned, tmp_path
):
    folder, lines = run(teacher, corpus_folder, tmp_path, "distill", "auto:1", aligned)
    record = json.loads((folder / "layers.json").read_text())
    assert layers_of(folder) == record["layers"] and recorded(folder) == str(record["layers"][0])
    assert record["text"] == f"held-out text of {corpus_folder / 'heldout'}.bin"
    assert f"selecting 1 softmax layers by KL on 320 tokens, {record['text']}" in lines
    # Measured as the stage itself measures what it begins with
    held = [row.split(",") for row in (folder / "heldout.csv").read_text().splitlines()]
    first = dict(zip(held[0], held[1], strict=True))
    assert record["curve"][1]["kl"] == pytest.approx(float(first["kl"]), abs=1e-5)
    assert "layers.json" in json.loads((folder / "manifest.json").read_text())["sha256"]
    extended, lines = run(teacher, corpus_folder, tmp_path, "extend", "auto:1", folder)
    assert layers_of(extended) == record["layers"] and recorded(extended) == recorded(folder)
    assert not (extended / "layers.json").exists() and not any("selecting" in line for line in lines)


def test_without_heldout_text_the_training_text_is_taken_and_said_so(teacher, corpus_folder, aligned, tmp_path):
    _, lines = run(teacher, corpus_folder, tmp_path, "distill", "auto:1", aligned, **{"train.validation_data_file": ""})
    assert any(f"the start of the training text, {corpus_folder / 'train'}.bin" in line for line in lines)


class Killed(BaseException):
    pass


def test_a_run_that_goes_on_selects_nothing_and_ends_the_same(teacher, corpus_folder, aligned, tmp_path, monkeypatch):
    straight, _ = run(teacher, corpus_folder, tmp_path / "straight", "distill", "auto:1", aligned)
    write, written = checkpointing.write_checkpoint, []

    def killing(*arguments, **keys):
        written.append(write(*arguments, **keys))
        if len(written) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpointing, "write_checkpoint", killing)
        run(teacher, corpus_folder, tmp_path / "killed", "distill", "auto:1", aligned)
    monkeypatch.setattr(auto_layers, "search", lambda *_, **__: pytest.fail("selected again"))
    folder, lines = run(teacher, corpus_folder, tmp_path / "killed", "distill", "auto:1", aligned)
    assert any("selected when this run began" in line for line in lines)
    assert any("going on after step 2" in line for line in lines)
    assert metrics(folder) == metrics(straight)
    pairs = zip(load_model(folder).parameters(), load_model(straight).parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    assert json.loads((folder / "layers.json").read_text())["layers"] == layers_of(straight)


def test_layers_that_are_named_after_align_become_the_teachers(teacher, corpus_folder, aligned, tmp_path, monkeypatch):
    began = []
    earlier = single_stage.run_stage

    def watched(config, student, *arguments, **keys):
        began.append({name: x.clone() for name, x in student.state_dict().items()})
        return earlier(config, student, *arguments, **keys)

    monkeypatch.setattr(single_stage, "run_stage", watched)
    folder, lines = run(teacher, corpus_folder, tmp_path, "distill", "0,2", aligned)
    assert layers_of(folder) == [0, 2]
    assert f"distill: layers 0,2 of {aligned} get the teacher's attention, as named" in lines
    expected = kept_student(load_model(aligned), build_teacher(open_teacher(teacher)), [0, 2]).state_dict()
    assert began[0].keys() == expected.keys() and all(torch.equal(began[0][name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("name", "layers", "keys", "message"),
    [
        (
            "align",
            "auto:3",
            {},
            "model.softmax_layers is auto:3, but only 3 of the 3 layers can be selected, and one of",
        ),
        ("align", "auto:0", {}, "model.softmax_layers is auto:0: give the number of layers to select, 1 or more"),
        ("distill", "auto:4", {}, "model.softmax_layers is auto:4, but only 3 of the 3 layers can be selected"),
        (
            "distill",
            "auto:1,2",
            {},
            "model.softmax_layers has 'auto:1': it stands alone, without other layers, in model",
        ),
        (
            "distill",
            "auto:2",
            {"model.layer_mixers": "0:rad_rwkv7"},
            "model.softmax_layers is auto:2, but only 2 of the 3",
        ),
        (
            "distill",
            "auto:1",
            {"train.teacher.hf_path": "", "train.validation_data_file": ""},
            "the distill stage names no teacher whose attention the layers of",
        ),
        ("distill", "0-2", {}, "model.softmax_layers is 0-2, which leaves no recurrent layer: name fewer"),
        ("distill", "auto:1", {"train.resume": "nowhere"}, "train.resume nowhere is not a checkpoint's folder: name"),
        ("extend", "auto:1", {}, "model.softmax_layers is auto:1, but "),
        ("extend", "0,2", {}, "model.softmax_layers is 0,2, but "),
    ],
)
def test_what_cannot_be_selected_is_refused(
    teacher, corpus_folder, aligned, tmp_path, monkeypatch, name, layers, keys, message
):
    start = "" if name == "align" else aligned
    monkeypatch.setattr(auto_layers, "search", lambda *_, **__: pytest.fail("selected before it was refused"))
    with pytest.raises(ValueError) as caught:
        run(teacher, corpus_folder, tmp_path, name, layers, start, **keys)
    assert str(caught.value).startswith(message)
    assert not any(tmp_path.iterdir())


def test_layers_beside_those_a_student_has_are_added_by_distill_alone(teacher, corpus_folder, aligned, tmp_path):
    folder, lines = run(teacher, corpus_folder, tmp_path, "distill", "2", aligned)
    assert not any("have learnt without" in line for line in lines)
    with pytest.raises(ValueError, match="and the extend stage adds none: give the layers of the model itself, or"):
        run(teacher, corpus_folder, tmp_path, "extend", "0,2", folder)
    more, lines = run(teacher, corpus_folder, tmp_path / "more", "distill", "0,2", folder)
    assert layers_of(more) == [0, 2]
    assert f"distill: layers 0 of {folder} get the teacher's attention, as named" in lines
    assert (
        f"distill: {folder} is from the distill stage, so its other layers have learnt without softmax there" in lines
    )
    with pytest.raises(ValueError, match="has qwen2 in layer 0, but the configuration names rad_rwkv7 there"):
        run(teacher, corpus_folder, tmp_path / "typo", "distill", "1,2", more)


def test_a_stage_that_leaves_out_the_layers_is_told_where_they_are_named(teacher, corpus_folder, aligned, tmp_path):
    folder, _ = run(teacher, corpus_folder, tmp_path, "distill", "0,2", aligned)
    with pytest.raises(ValueError) as caught:
        run(teacher, corpus_folder, tmp_path, "extend", "2", folder)
    assert str(caught.value) == (
        f"{folder} keeps softmax in layers 0, where the configuration names another mixer: give model.softmax_layers "
        "as the stage before ran with it, in its config.yaml"
    )


def test_a_student_that_keeps_another_number_is_refused(teacher, corpus_folder, aligned, tmp_path):
    folder, _ = run(teacher, corpus_folder, tmp_path, "distill", "0,2", aligned)
    with pytest.raises(ValueError) as caught:
        run(teacher, corpus_folder, tmp_path, "extend", "auto:1", folder)
    assert str(caught.value) == (
        f"{folder} keeps softmax in layers 0,2, but model.softmax_layers is auto:1: set it to 0,2, or to auto:2"
    )


def test_layers_that_are_named_otherwise_are_not_selected(teacher, corpus_folder, aligned, tmp_path):
    keys = {"model.layer_mixers": "0:rad_rwkv7"}
    folder, _ = run(teacher, corpus_folder, tmp_path, "distill", "auto:1", aligned, **keys)
    values = json.loads((folder / "layers.json").read_text())["rounds"][0]["values"]
    assert set(values) == {"1", "2"}


def test_layers_that_are_softmax_already_are_not_selected(teacher, corpus_folder, tmp_path):
    keys = {"model.tmix2": "qwen3", "model.inv_other_layer_ratio": 3}
    aligned = train_stage(stage(teacher, corpus_folder, tmp_path, "align", "auto:1", **keys), tiny.Silent()).folder
    folder, _ = run(teacher, corpus_folder, tmp_path, "distill", "auto:1", aligned, **keys)
    assert set(json.loads((folder / "layers.json").read_text())["rounds"][0]["values"]) == {"0", "1"}


# Whole conversions and several processes

SMALL = ["--set", "model.ctx_len=32", "--set", "train.my_exit_tokens=1280", "--set", "train.micro_bsz=4"]
SMALL += ["--set", "train.heldout_tokens=640", "--set", "model.softmax_layers=auto:1"]


def convert(teacher, corpus_folder, out):
    data = ["--data", corpus_folder / "train", "--heldout-data", corpus_folder / "heldout"]
    return main([str(word) for word in ["demo", "--teacher", teacher, *data, "--out", out, *SMALL]])


@pytest.mark.slow
def test_a_conversion_selects_once(teacher, corpus_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("radlads.recipes.conversion._measure_use", killed)
        convert(teacher, corpus_folder, out)
    record = json.loads((out / "layers.json").read_text())
    monkeypatch.setattr(auto_layers, "search", lambda *_, **__: pytest.fail("selected again"))
    assert convert(teacher, corpus_folder, out) == 0
    said = capsys.readouterr().out
    assert f"softmax layers {record['layers'][0]}, selected earlier (held-out text of" in said
    assert "2-distill: finished earlier, kept" in said
    assert [layers_of(out / name) for name in ("1-align", "2-distill", "3-extend", "hf")] == [
        [],
        *[record["layers"]] * 3,
    ]
    assert recorded(out / "3-extend") == str(record["layers"][0])
    page = (out / "report.html").read_text()
    assert "Which layers to keep as softmax" in page and f"student: {record['layers'][0]}." in page
    assert json.loads((out / "summary.json").read_text())["reload_max_abs_diff"] == 0


def killed(*_):
    raise Killed


@pytest.mark.slow
def test_two_processes_share_the_layers(aligned, tmp_path):
    command = ["select", aligned, "--keep", "2", "--device", "cpu", "--tokens", "640", "--ctx-len", "64", "--out"]
    assert main([str(word) for word in [*command, tmp_path / "one.json"]]) == 0
    words = [sys.executable, "-m", "radlads.cli", *command, tmp_path / "two.json", "--devices", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--model.softmax_layers") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["block_runs"] < one["block_runs"]
    same = one.keys() - {"seconds", "block_runs", "rounds", "curve", "uniform"}
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    for key in ("curve", "uniform"):
        assert [row["kl"] for row in one[key]] == pytest.approx([row["kl"] for row in two[key]], abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_same_layers(teacher, corpus_folder, aligned, tmp_path):
    keys = {"model.ctx_len": 16, "model.groupnorm_att": 0, "model.gate_rank_type": 2, "model.softmax_layers": "auto:1"}
    keys |= {"train.attention_distillation_stage": 2, "train.data_file": corpus_folder / "train"}
    keys |= {"train.precision": "fp32", "train.accelerator": "cpu", "train.micro_bsz": 2, "train.my_exit_tokens": 320}
    keys |= {"train.load_model": aligned, "train.teacher.hf_path": teacher, "train.proj_dir": tmp_path}
    keys |= {"train.heldout_tokens": 320, "train.devices": 2, "train.strategy": "fsdp", "train.proj_name": "distill"}
    words = [sys.executable, "-m", "radlads.cli", "train", *(f"--{key}={value}" for key, value in keys.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "distill"
    assert layers_of(folder) == json.loads((folder / "layers.json").read_text())["layers"]
