"""One file in a folder is a new mixer: every command takes it, and nothing of radlads is edited.

The file is the full example of docs/mixers.md: a setting of its own, and a tensor of its own in the state.
"""

import csv
import http.client
import io
import json
import os
import subprocess
import sys
from urllib.parse import urlparse

import documented_mixers
import pytest
import tiny
from local_server import serving
from tolerances import TRAJECTORY_MAX
from transformers import AutoModelForCausalLM

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main

SMALL = {"model.ctx_len": 32, "train.my_exit_tokens": 1280, "train.micro_bsz": 4, "train.heldout_tokens": 640}
LEAK = "model.mixer.leak"
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>{% endfor %}"
GREEDY = ["--temperature", "0", "--max-tokens", "8", "--device", "cpu"]
# Of its own: as many of the state's bytes as a mean of 2 x 16 values takes in fp32
STATE_BYTES = {"wkv": 4 * 16 * 16 * 4, "mean": 2 * 16 * 4}


@pytest.fixture(scope="module")
def mixers(tmp_path_factory):
    """The folder of the page's mixers, which each command has to find by --mixer-path."""
    folder = documented_mixers.write_mixers(tmp_path_factory.mktemp("mixers"))
    with documented_mixers.nothing_known():
        yield folder


@pytest.fixture(autouse=True)
def _no_command_finds_what_another_was_told(mixers):
    with documented_mixers.nothing_known():
        yield


@pytest.fixture(scope="module")
def talking_teacher(tmp_path_factory):
    folder = tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def run(mixers, talking_teacher, corpus_folder, tmp_path_factory):
    """A whole conversion by `radlads demo`."""
    out = tmp_path_factory.mktemp("conversion") / "run"
    data = ["--data", corpus_folder / "train", "--heldout-data", corpus_folder / "heldout"]
    settings = [word for key, value in (SMALL | {LEAK: 0.25}).items() for word in ("--set", f"{key}={value}")]
    with documented_mixers.nothing_known():
        command = ["demo", "--teacher", talking_teacher, "--mixer", "leaky", "--mixer-path", mixers, "--out", out]
        assert radlads(*command, *data, *settings) == 0
    return out


def radlads(*words):
    return main([str(word) for word in words])


def said(capsys, *words):
    """What a command prints."""
    capsys.readouterr()
    assert radlads(*words) == 0
    return capsys.readouterr().out


def test_the_demo_trains_it_with_its_setting(run):
    for folder in (*sorted(run.glob("[123]-*")), run / "hf"):
        config = json.loads((folder / "config.json").read_text())
        assert config["time_mixers"] == ["leaky"] * 3
        assert config["mixer_settings"] == {"leaky": {"leak": 0.25}}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reload_max_abs_diff"] == 0  # in a process without radlads and the file
    # In bf16, as one would serve it, which leaves both tensors of the state in fp32
    assert summary["bytes"]["student"] == dict.fromkeys(["1024", "8192", "65536"], 3 * sum(STATE_BYTES.values()))


def test_its_own_weight_is_fresh_and_learns(run, mixers):
    with documented_mixers.known(mixers):
        aligned, ended = load_model(run / "1-align"), load_model(run / "3-extend")
    for model in (aligned, ended):
        assert all(block.self_attn.mean_weight.abs().max() > 0 for block in model.model.layers)


def test_it_is_what_its_file_says(mixers, capsys):
    lines = said(capsys, "mixers", "leaky", "--mixer-path", mixers)
    assert "RAD-RWKV7 with a leaky mean" in lines
    assert "--model.mixer.leak: a number, default 0.1" in lines
    assert "Share of the mean that each token replaces, in (0, 1]." in lines
    assert "tmix_leaky.py" in said(capsys, "mixers", "--mixer-path", mixers)


# A stage by itself, alone and on two processes


def stage(run, talking_teacher, corpus_folder, out, name, mixers, **train):
    """The words of `radlads train` for a second stage after the demo's first."""
    keys = {
        "model.ctx_len": 16,
        "model.tmix": "leaky",
        LEAK: 0.25,
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        "train.attention_distillation_stage": 2,
        "train.load_model": run / "1-align",
        "train.teacher.hf_path": talking_teacher,
        "train.data_file": corpus_folder / "train",
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.lr_init": 1e-3,
        "train.my_exit_tokens": 16 * 8 * 6,
        "train.log_every_n_steps": 1,
        "train.proj_dir": out,
        "train.proj_name": name,
    }
    keys |= {f"train.{key}": value for key, value in train.items()}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return ["train", "--mixer-path", str(mixers), *words]


@pytest.fixture(scope="module")
def alone(run, talking_teacher, corpus_folder, mixers, tmp_path_factory):
    """The folder of stage `one`, by one process."""
    out = tmp_path_factory.mktemp("stages")
    with documented_mixers.nothing_known():
        assert main(stage(run, talking_teacher, corpus_folder, out, "one", mixers, micro_bsz=8)) == 0
    return out


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_stage_trains_it(alone, run):
    assert len(losses(alone / "one")) == 6
    assert json.loads((alone / "one" / "config.json").read_text())["mixer_settings"] == {"leaky": {"leak": 0.25}}


def test_a_setting_that_is_not_the_models_is_refused(run, talking_teacher, corpus_folder, mixers, tmp_path, capsys):
    words = stage(run, talking_teacher, corpus_folder, tmp_path, "other", mixers)
    words[words.index(f"--{LEAK}") + 1] = "0.5"
    assert main(words) == 2
    assert "model.mixer.leak is 0.5, but leaky in the model has 0.25" in capsys.readouterr().err
    words[words.index(f"--{LEAK}") + 1] = "2"
    assert main(words) == 2
    assert "model.mixer.leak must be in (0, 1], not 2.0" in capsys.readouterr().err


def test_two_processes_in_shards_make_the_same_curve(alone, run, talking_teacher, corpus_folder, mixers):
    words = stage(run, talking_teacher, corpus_folder, alone, "two", mixers, micro_bsz=4, devices=2, strategy="fsdp")
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "radlads.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    one, two = losses(alone / "one"), losses(alone / "two")
    assert max(abs(a / b - 1) for a, b in zip(two, one, strict=True)) < TRAJECTORY_MAX


# Plans and measurements


def test_a_plan_knows_its_state_and_says_that_it_was_never_measured(talking_teacher, mixers, capsys):
    words = ["plan", talking_teacher, "--mixer", "leaky", "--mixer-path", mixers, "--set", f"{LEAK}=0.25"]
    lines = said(capsys, *words)
    assert "leaky" in lines and "neither memory nor speed was ever measured" in lines


def test_a_benchmark_runs_it(talking_teacher, mixers, tmp_path):
    own = ["--mixer", "leaky", "--mixer-path", mixers, "--set", f"{LEAK}=0.25", "--device", "cpu"]
    own += ["--shape", talking_teacher, "--layers", "2"]
    cases = {
        "train": ["--stage", "align", "--batch", "2", "--tokens", "16"],
        "prefill": ["--tokens", "24", "--piece", "8", "--no-teacher"],
        "decode": ["--batch", "2", "--tokens", "16", "--no-teacher"],
    }
    for kind, words in cases.items():
        assert radlads("bench", kind, *words, *own, "--json", tmp_path / f"{kind}.json") == 0
        assert "leaky" in (tmp_path / f"{kind}.json").read_text()


def test_long_contexts_are_measured(run, talking_teacher, mixers, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 40)
    words = ["--lengths", "256", "--depths", "0,100", "--samples", "1", "--batch-size", "2", "--text-tokens", "600"]
    where = ["--text", tmp_path / "book.txt", "--out", tmp_path / "out", "--device", "cpu", "--mixer-path", mixers]
    assert radlads("longcontext", run / "hf", *words, *where) == 0
    (cost,) = json.loads((tmp_path / "out" / "longcontext.json").read_text())["models"]["student"]["costs"]
    assert cost["state_bytes"] == 3 * sum(STATE_BYTES.values())


def test_a_report_calls_it_by_its_title(run, mixers):
    assert radlads("report", run, "--mixer-path", mixers) == 0
    assert "RAD-RWKV7 with a leaky mean" in (run / "report.html").read_text()


def test_a_report_needs_no_file_of_the_mixer(run):
    assert radlads("report", run) == 0
    assert "leaky" in (run / "report.html").read_text()


# Use


@pytest.fixture
def generated(run, mixers, capsys):
    return lambda *words: said(capsys, "generate", run / "hf", *GREEDY, *words, "--mixer-path", mixers)


def test_a_saved_state_goes_on_as_the_text_would(generated, tmp_path):
    whole = generated("--prompt", "Once upon a time")
    generated("--prompt", "Once upon", "--save-state", tmp_path / "state")
    assert generated("--prompt", " a time", "--load-state", tmp_path / "state") == whole


def test_it_chats(run, mixers, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\nWhere?")))
    answers = said(capsys, "chat", run / "hf", *GREEDY, "--mixer-path", mixers)
    assert answers.endswith("\n") and len(answers) > 2


def test_it_is_served(run, mixers, generated):
    pytest.importorskip("uvicorn")
    expected = generated("--prompt", "Once upon a time")
    asked = {"model": "leaky", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    with documented_mixers.known(mixers), serving(run / "hf", "--name", "leaky") as url:
        connection = http.client.HTTPConnection(urlparse(url).netloc)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["text"] == expected.rstrip("\n").removeprefix("Once upon a time")


# Elsewhere


def test_an_export_has_its_file_and_loads_where_neither_radlads_nor_the_file_is(run, mixers, tmp_path, capsys):
    words = ["export", run / "3-extend", tmp_path / "out", "--dtype", "bfloat16", "--mixer-path", mixers]
    assert "loaded without radlads, its logits differ from the model's by at most 0.0e+00" in said(capsys, *words)
    shipped = (tmp_path / "out" / "tmix_leaky.py").read_text()
    assert shipped == documented_mixers.examples()["tmix/tmix_leaky.py"].replace("from radlads.model.", "from .")
    assert "RAD-RWKV7 with a leaky mean" in (tmp_path / "out" / "README.md").read_text()


def test_the_smallest_mixer_of_the_page_begins_with_the_teachers_weights_and_trains(
    talking_teacher, corpus_folder, mixers, tmp_path
):
    keys = {"model.tmix": "mean", "model.ctx_len": 16, "train.my_exit_tokens": 320, "train.micro_bsz": 4}
    keys |= {"train.attention_distillation_stage": 1, "train.teacher.hf_path": talking_teacher}
    keys |= {"train.data_file": corpus_folder / "train", "train.accelerator": "cpu", "train.precision": "fp32"}
    keys |= {"train.proj_dir": tmp_path, "train.proj_name": "align", "train.lr_init": 1e-3}
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert radlads("train", "--mixer-path", mixers, *words) == 0
    teachers = AutoModelForCausalLM.from_pretrained(talking_teacher).model.layers[0].self_attn.v_proj.weight
    with documented_mixers.known(mixers):
        trained = load_model(tmp_path / "align").model.layers[0].self_attn.v_proj.weight
    assert 0 < (trained - teachers).abs().max() < 0.1 * teachers.abs().max()
