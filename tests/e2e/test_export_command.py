"""`radlads export` of a stage that was really trained, loaded in a process that cannot import radlads."""

import json

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.recipes import reload_check
from radlads.recipes.reload_check import logits_of, reloaded_logits
from radlads.recipes.single_stage import train_stage


@pytest.fixture(scope="module")
def trained(teacher, corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    keys = {"train.teacher.hf_path": str(teacher), "train.proj_dir": str(out), "train.heldout_tokens": 160}
    keys |= {"train.validation_data_file": str(corpus_folder / "heldout")}
    return train_stage(tiny.stage_config(corpus_folder, "align", **keys), tiny.Silent()).folder


def test_a_trained_stage_is_exported_in_shards_that_load_alone(trained, tmp_path, capsys):
    out = tmp_path / "mine.7b"
    assert main(["export", str(trained), str(out), "--shard-size", "100KB", "--dtype", "bfloat16"]) == 0
    assert "loaded without radlads, its logits differ from the model's by at most 0.0e+00" in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(
        logits_of(load_model(out), [1, 2]), logits_of(load_model(trained, dtype=torch.bfloat16).float(), [1, 2])
    )
    assert AutoTokenizer.from_pretrained(out).decode([65, 66])
    loss = json.loads((trained / "manifest.json").read_text())["heldout"]["loss"]
    assert f"| align | {loss:.4f} |" in (out / "README.md").read_text()


def test_code_that_needs_radlads_is_no_export(trained, tmp_path, capsys, monkeypatch):
    """The process that loads it has neither the package nor the paths of this one."""
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setattr(reload_check, "_SCRIPT", reload_check._SCRIPT.replace("import torch\n", "import radlads\n"))
    with pytest.raises(ValueError, match="does not load on its own: ModuleNotFoundError: radlads"):
        reloaded_logits(trained, [1], torch.float32)
