"""A model's config.json that is damaged or not of its weights: one sentence, no memory taken."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.model.configuration import RadladsConfig

NO_MODEL = "config.json describes no model that can be read here: has "


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    return tiny.changeable_export(teacher, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def model(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def change_config(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(capsys, folder):
    """What generate says of a model that it refuses."""
    assert main(["generate", str(folder), "--prompt", "ab", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": -16}, "head_dim -16, which is not a whole number from 1 to"),
        ({"hidden_size": 10**12}, "hidden_size 1000000000000, which is not a whole number from 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, which is not a whole number from 1 to 4096"),
        ({"vocab_size": True}, "vocab_size True, which is not a whole number"),
        ({"lora_rank_decay": 10**12}, "lora_rank_decay 1000000000000, which is not a whole number from 0 to"),
        ({"lora_rank_gate": -1}, "lora_rank_gate -1, which is not a whole number from 0 to"),
        ({"layer_types": ["x"] * 3}, "layer_types ['x', 'x', 'x'], which are not 3 of full_attention"),
        ({"layer_types": ["linear_attention"]}, "layer_types ['linear_attention'], which are not 3 of"),
        ({"layer_types": 5}, "layer_types 5, which is not a list of names"),
        ({"time_mixers": [1, 2, 3]}, "time_mixers [1, 2, 3], which is not a list of names"),
        ({"pad_token_id": "x"}, "pad_token_id 'x', which is not a token's id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id [1, 'x'], which is not a token's id or a list of them"),
        ({"balance_state": "no"}, "balance_state 'no', which is not true or false"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0, which is not a number from 0 to 1"),
        ({"model_type": []}, "model_type [], which is not a text"),
        ({"auto_map": None}, "an auto_map that is no object"),
    ],
    ids=str,
)
def test_a_value_that_is_none_is_one_sentence(model, capsys, values, message):
    change_config(model, values)
    assert NO_MODEL + message in refused(capsys, model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": 4000, "time_mixers": None, "channel_mixers": None, "layer_types": None},
            "have 3 layers, b",
        ),
        ({"hidden_size": 2**26}, "model.embed_tokens.weight in"),
        ({"head_dim": 2**20}, "model.layers.0.self_attn.q_proj.weight in"),
        ({"lora_rank_decay": 2**26}, "model.layers.0.self_attn.w1 in"),
    ],
    ids=["layers", "hidden_size", "head_dim", "rank"],
)
def test_sizes_that_are_not_the_weights_take_no_memory(model, capsys, monkeypatch, values, message):
    change_config(model, values)
    monkeypatch.setattr("radlads.checkpoint.model_folder.unfilled_model", None)
    assert message in refused(capsys, model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_weights_that_need_scales_are_one_sentence(model, capsys, dtype):
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, model)
    assert f"lm_head.weight in {model} holds {str(dtype).removeprefix('torch.')}, as quantised weights do" in said


def test_a_quantised_model_of_ours_is_one_sentence(model, capsys):
    change_config(model, {"quantization_config": {"quant_method": "fp8"}})
    assert f"{model} is quantised (fp8), which is not supported" in refused(capsys, model)


def test_a_teachers_sizes_that_are_not_its_weights_are_refused(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    change_config(folder, {"intermediate_size": 95})
    with pytest.raises(ValueError, match=r"gate_proj\.weight in .* has shape \(96, 64\), but .* says \(95, 64\)"):
        open_teacher(folder)


def test_null_stands_for_the_default(model):
    change_config(model, {"pad_token_id": None, "lora_rank_decay": None, "layer_types": None, "qk_norm": None})
    assert load_model(model).config.layer_types == ["linear_attention"] * 3


def test_an_odd_head_size_goes_without_rope_alone():
    sizes = {"num_hidden_layers": 1, "hidden_size": 60, "num_attention_heads": 4}
    assert RadladsConfig(**sizes, use_rope=False).head_dim == 15
    for needs_rope in ({}, {"use_rope": False, "time_mixers": ["qwen2"]}):
        with pytest.raises(ValueError, match="head_dim must be even for RoPE"):
            RadladsConfig(**sizes, **needs_rope)
