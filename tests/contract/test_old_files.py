"""What an older radlads wrote is read by this one: models, parents of stages, unfinished runs, stored states.

old_files/make.py says what the files are and how they were made. Two processes: distributed/test_old_checkpoints.py.
"""

import json
from pathlib import Path

import pytest
from old_runs import FILES, assert_ends_as_then, assert_same_curves, assert_same_weights, copied, logits
from safetensors.torch import load_file
from tolerances import SAME_MODEL, relative_error

from radlads.checkpoint.manifest import joint_hash
from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes.export import find_source

MODELS = ("hybrid", "rwkv6", "rwkv7-balanced", "rwkv7-groupnorm")
EXPORTS = ("hybrid", "rwkv6", "rwkv7-balanced")
RUNS = ("alone", "ddp", "fsdp", "zero2", "zero3")
FOLDERS = [f"stages/{model}/{stage}" for model in MODELS for stage in ("1-align", "2-distill")]
FOLDERS += [f"exports/{model}" for model in EXPORTS]
BY_ONE_PROCESS = ("--train.devices", "1", "--train.micro_bsz", "4", "--train.strategy", "auto")


@pytest.fixture
def old(tmp_path, monkeypatch):
    folder = copied(tmp_path)
    monkeypatch.chdir(folder)
    return folder


def train(stage, *more):
    """What `radlads train` returns for the configuration in a stage's folder."""
    return main(["train", "-c", f"{stage}/config.yaml", *more])


def manifest(stage):
    return json.loads(Path(stage, "manifest.json").read_text())


def test_no_file_is_forgotten():
    expected = {*load_file(FILES / "expected" / "logits.safetensors")} - {"tokens"}
    assert expected == {*FOLDERS}
    assert [path.name for path in sorted((FILES / "unfinished").iterdir())] == [f"{name}.partial" for name in RUNS]
    assert [path.name for path in sorted((FILES / "states").iterdir())] == [f"{name}.state" for name in EXPORTS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_model_has_the_logits_it_had(folder):
    expected = load_file(FILES / "expected" / "logits.safetensors")[folder]
    assert relative_error(logits(load_model(FILES / folder), FILES), expected) < SAME_MODEL


@pytest.mark.parametrize("model", EXPORTS)
def test_transformers_loads_an_export(model):
    expected = load_file(FILES / "expected" / "logits.safetensors")[f"exports/{model}"]
    found = RadladsForCausalLM.from_pretrained(FILES / "exports" / model, dtype="float32")
    assert relative_error(logits(found, FILES), expected) < SAME_MODEL


@pytest.mark.parametrize("model", MODELS)
def test_distilling_from_an_old_align_stage_goes_as_it_went(old, model):
    then, now = Path("stages", model, "2-distill"), Path("stages", model, "again")
    assert train(then, "--train.proj_name", now.name) == 0
    assert manifest(now)["parent"] == manifest(then)["parent"]
    assert_same_curves(now / "metrics.csv", then / "metrics.csv")
    assert_same_weights(*(load_file(each / "model.safetensors") for each in (now, then)))


@pytest.mark.parametrize("model", MODELS)
def test_a_stage_after_an_old_one_knows_its_ancestors(old, model):
    parent, child = f"stages/{model}/2-distill", f"stages/{model}/3-extend"
    stage = ("--train.attention_distillation_stage", "-1", "--train.my_exit_tokens", "64")
    assert train(parent, *stage, "--train.load_model", parent, "--train.proj_name", "3-extend") == 0
    assert manifest(child)["parent"] == f"{parent} sha256:{joint_hash(manifest(parent)['sha256'])[:16]}"
    assert [each.name for each in find_source(Path(child), None).stages] == ["align", "distill", "extend"]


def test_an_old_stage_with_other_weights_is_no_parent(old, capsys):
    weights = Path("stages/rwkv6/1-align/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train("stages/rwkv6/2-distill", "--train.proj_name", "again") == 2
    assert "model.safetensors is not the file its manifest.json describes" in capsys.readouterr().err


@pytest.mark.parametrize("run", RUNS)
def test_an_unfinished_run_goes_on_to_the_same_end(old, run, capsys):
    assert train(f"unfinished/{run}.partial", *(() if run == "alone" else BY_ONE_PROCESS)) == 0
    assert "going on after step 3 of 6" in "".join(capsys.readouterr())
    assert_ends_as_then(old, run)


@pytest.mark.parametrize("model", EXPORTS)
def test_a_stored_state_is_gone_on_from(old, model, capsys):
    texts = json.loads(Path("expected/texts.json").read_text())[model]
    for question, text in zip(("what was that?", ""), texts, strict=True):
        options = ("--load-state", f"states/{model}.state", "--prompt", question, "--max-tokens", "32", "--seed", "5")
        capsys.readouterr()
        assert main(["generate", f"exports/{model}", "--device", "cpu", *options]) == 0
        assert capsys.readouterr().out == text


@pytest.mark.parametrize("model", EXPORTS)
def test_a_stored_state_is_stored_again_as_it_was(old, model):
    options = ("--load-state", f"states/{model}.state", "--prompt", "", "--save-state", "again", "--max-tokens", "0")
    assert main(["generate", f"exports/{model}", "--device", "cpu", *options]) == 0
    found, expected = load_file("again"), load_file(f"states/{model}.state")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
