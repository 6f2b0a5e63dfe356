"""Teachers as GGUF files: equal to transformers' own reading, whole or in parts, and refused in a sentence."""

import sys
from pathlib import Path

import gguf_files
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from radlads.checkpoint.gguf_file import origin_note
from radlads.checkpoint.tokenizer_files import locate_tokenizer
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_teacher

TOKENS = torch.arange(2 * 37).view(2, 37) * 7 % tiny.VOCAB


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RADLADS_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def logits_of(path: Path) -> torch.Tensor:
    return build_teacher(open_teacher(path))(TOKENS).logits


def assert_parity(logits: torch.Tensor, model: torch.nn.Module, tolerance: float) -> None:
    with torch.no_grad():
        wanted = model(TOKENS).logits
    assert (logits - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("architecture", gguf_files.CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_of_floats_is_the_model_it_was_written_from(tmp_path, architecture, tied):
    model = gguf_files.model(architecture, tied=tied)
    file = gguf_files.write(tmp_path / "m.gguf", model)
    assert_parity(logits_of(file), model, 1e-5)
    assert open_teacher(file).config.tie_word_embeddings == tied


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16])
def test_quantised_weights_are_those_that_transformers_dequantises(tmp_path, kind):
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"), quantised=kind)
    assert_parity(logits_of(file), AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf"), 1e-4)


def test_one_line_says_what_was_dequantised(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model("qwen2"), quantised=GGMLQuantizationType.Q8_0)
    assert origin_note(open_teacher(file).folder) == "m.gguf: dequantised to fp32 (23 Q8_0, 16 F32)"
    assert origin_note(tmp_path) is None


@pytest.mark.parametrize("aligned", [32, 256])
def test_parts_of_a_split_file_are_one_model(tmp_path, aligned):
    model = gguf_files.model("qwen2")
    for number in (1, 2, 3):
        gguf_files.write(tmp_path / f"m-0000{number}-of-00003.gguf", model, part=(number, 3), aligned=aligned)
    assert_parity(logits_of(tmp_path), model, 1e-5)
    assert_parity(logits_of(tmp_path / "m-00002-of-00003.gguf"), model, 1e-5)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"lacks m-00002-of-00003.gguf: put all 3 parts"):
        open_teacher(tmp_path)


def test_tokenizer_template_ends_and_licence_come_from_the_file(tmp_path):
    folder = open_teacher(gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"))).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"
    assert '"eos_token_id": [\n    256,\n    257\n  ]' in (folder / "generation_config.json").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert locate_tokenizer(tmp_path) == folder


def test_a_tokenizer_has_no_tokens_beyond_the_files(tmp_path):
    folder = open_teacher(gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"))).folder
    assert max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) == tiny.VOCAB - 1


def test_a_file_is_read_once(tmp_path, monkeypatch):
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"))
    first = open_teacher(file).folder
    monkeypatch.setattr("radlads.checkpoint.gguf_file._unpack", lambda *_: pytest.fail("read again"))
    assert open_teacher(tmp_path).folder == first


REFUSED = {
    "gemma": ({"architecture": "gemma3"}, "holds the architecture 'gemma3': only llama, qwen2, qwen3"),
    "rope": ({"more": {"llama.rope.scaling.factor": 8.0}}, "has a RoPE scaling, which transformers does not read"),
    "experts": ({"more": {"llama.expert_count": 8.0}}, "has experts"),
    "biases": ({"extra": "blk.1.attn_q.bias"}, "has 31 tensors, but a LlamaForCausalLM takes only 30"),
    "incomplete": ({"without": "blk.1.ffn_up.weight"}, r"lacks model.layers.1.mlp.up_proj.weight \(1 such\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused(tmp_path, case):
    keys, sentence = REFUSED[case]
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"), **keys)
    with pytest.raises(ValueError, match=sentence):
        open_teacher(file)
    assert not list((tmp_path / "cache" / "gguf").glob("m*"))


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.3, 0.6, 0.95, 0.9999])
def test_a_truncated_file_is_said_to_be_one(tmp_path, share):
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model("llama"))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size) + 4])
    with pytest.raises(ValueError, match="truncated"):
        open_teacher(file)


def test_other_files_and_folders_of_several_are_refused(tmp_path):
    (tmp_path / "a.gguf").write_text("no model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        open_teacher(tmp_path)
    (tmp_path / "b.gguf").write_text("no model")
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\): name one"):
        open_teacher(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_teacher(tmp_path / "c.gguf")


def test_the_command_names_a_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["demo", "--teacher", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'radlads[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
