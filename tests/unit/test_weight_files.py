"""Weights between file formats: the same numbers, little memory, and refusals that leave nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from root_scripts import ROOT, largest_file, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from radlads.checkpoint import pth
from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.pth import PthFile
from radlads.checkpoint.safetensors_writer import write_safetensors
from radlads.checkpoint.weight_files import (
    convert_to_pth,
    convert_to_safetensors,
    open_weights,
    parse_size,
    starting_point,
)
from radlads.config.schema import ModelConfig
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student


def state_dict():
    torch.manual_seed(3)
    return {
        "scalar": torch.tensor(1.5),
        "half": torch.randn(7, 3).bfloat16(),
        "wide": torch.randn(5, 11, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(6, 9).t(),
        "slice": torch.randn(100)[10:13],
        "count": torch.arange(3),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(state_dict(), tmp_path / "in.pth")
    return tmp_path / "in.pth"


def test_pth_to_safetensors_and_back_is_bit_equal(checkpoint, tmp_path):
    convert_to_safetensors(checkpoint, tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), state_dict())
    convert_to_pth(tmp_path / "out.safetensors", tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "in.pth", "out.safetensors"]


def test_a_safetensors_file_says_that_it_is_pytorchs(checkpoint, tmp_path):
    convert_to_safetensors(checkpoint, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_found_again_after_the_mapping_was_made_anew(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "REMAP_BYTES", 20)
    weights = PthFile(checkpoint)
    assert_same({name: weights[name].clone() for name in weights}, state_dict())
    convert_to_pth(checkpoint, tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), state_dict())


def test_shards_hold_what_they_may_and_the_index_names_them(tmp_path):
    weights = {f"layer.{number}": torch.full((100,), float(number)) for number in range(5)}
    torch.save(weights, tmp_path / "in.pth")
    convert_to_safetensors(tmp_path / "in.pth", tmp_path / "out", shard_bytes=900)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["checksums.json", *names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"]["layer.2"] == names[1]
    assert_same(open_weights(tmp_path / "out"), weights)


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    torch.save({"small": torch.ones(1), "large": torch.ones(1000), "last": torch.ones(1)}, tmp_path / "in.pth")
    convert_to_safetensors(tmp_path / "in.pth", tmp_path / "out", shard_bytes=100)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_a_shard_that_lacks_a_tensor_of_its_index_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "x.safetensors"}}')
    with pytest.raises(ValueError, match=r"x\.safetensors lacks b"):
        open_weights(tmp_path)["b"]


def test_a_converted_model_folder_loads_with_transformers(teacher, tmp_path):
    student, _ = build_student(open_teacher(teacher), ModelConfig(groupnorm_att=0))
    export(student.eval(), teacher, tmp_path / "stage")
    for code in (tmp_path / "stage").glob("*.py"):
        code.unlink()
    convert_to_safetensors(tmp_path / "stage", tmp_path / "out", shard_bytes=100_000)
    tokens = torch.randint(256, (2, 9))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(found(tokens).logits, student(tokens).logits)
    assert torch.equal(load_model(tmp_path / "out")(tokens).logits, student(tokens).logits)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/never-made-by-a-checkpoint",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Malicious()}, "holds more than weights, such as code to be run"),
        ([torch.ones(1)], "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"model": {"a": torch.ones(1)}}, "holds 'model', which is no tensor"),
    ],
)
def test_a_pth_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        PthFile(tmp_path / "x.pth")
    assert not Path("/tmp/never-made-by-a-checkpoint").exists()


@pytest.mark.parametrize("kept_bytes", [0, 100, 2000, -10])
def test_a_truncated_pth_file_is_refused(checkpoint, kept_bytes):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"is truncated or damaged, or not a \.pth file"):
        PthFile(checkpoint)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_pth_file_is_a_sentence(tmp_path):
    torch.save({f"layer.{number}": torch.ones(3) for number in range(4)}, tmp_path / "in.pth")
    whole, sentences = (tmp_path / "in.pth").read_bytes(), []
    for position in range(60, 460, 2):  # where its names and sizes are
        damaged = bytearray(whole)
        damaged[position] ^= 0x24
        (tmp_path / "x.pth").write_bytes(damaged)
        try:
            PthFile(tmp_path / "x.pth")
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) > 50
    assert all("x.pth" in sentence and "\n" not in sentence for sentence in sentences)


def safetensors_file(header, data=b"", num_bytes=None):
    text = header.encode()
    return (len(text) if num_bytes is None else num_bytes).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or not a safetensors file"),
        (safetensors_file("{nonsense"), "is truncated or not a safetensors file"),
        (safetensors_file("{}", num_bytes=2**60), "is truncated or not a safetensors file"),
        (safetensors_file('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "is truncated or not"),
        (safetensors_file('{"a":{"dtype":"U16","shape":[1],"data_offsets":[0,2]}}', b"ab"), "a in .* holds U16"),
        (safetensors_file("{}"), "holds no weights"),
    ],
)
def test_a_damaged_safetensors_file_is_a_sentence(tmp_path, content, message):
    (tmp_path / "in.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        convert_to_safetensors(tmp_path / "in.safetensors", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "in.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_a_sentence(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is (damaged|not an index)"):
        open_weights(tmp_path)


def test_names_that_lead_nowhere_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_weights(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"in\.pth exists already"):
        convert_to_pth(checkpoint, checkpoint)
    with pytest.raises(ValueError, match="is not a folder: make it first"):
        convert_to_pth(checkpoint, tmp_path / "no" / "x.pth")


def test_where_a_stage_starts(tmp_path):
    final = tmp_path / "rwkv-final.pth"
    assert [starting_point(named) for named in ("", "auto", "x.pth", str(final))] == [None, None, Path("x.pth"), final]
    (tmp_path / "manifest.json").touch()
    assert starting_point(str(final)) == tmp_path
    assert starting_point(str(tmp_path / "rwkv-7.pth")) == tmp_path / "rwkv-7.pth"
    final.touch()
    assert starting_point(str(final)) == final


def test_loading_draws_no_initial_values(teacher, tmp_path):
    student, _ = build_student(open_teacher(teacher), ModelConfig(groupnorm_att=0))
    save_model(student, tmp_path)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(dict(loaded.named_parameters()), dict(student.named_parameters()))


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2KB", 2000)]
)
def test_sizes_of_shards(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 TB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a shard's size is given as"):
        parse_size(text)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script of the repository root; its exit code and what it wrote to stderr."""

    def run(script, *arguments):
        return run_script(monkeypatch, script, *arguments), capsys.readouterr().err

    return run


def test_the_commands_convert_there_and_back(run, teacher, tmp_path):
    assert run("convert_hf_to_pth.py", teacher, tmp_path / "x.pth") == (0, "")
    assert_same(torch.load(tmp_path / "x.pth", weights_only=True), load_file(teacher / "model.safetensors"))
    options = ["--shard-size", "100KB", "--tokenizer", teacher]
    assert run("convert_to_safetensors.py", tmp_path / "x.pth", tmp_path / "out", *options) == (0, "")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    assert_same(open_weights(tmp_path / "out"), load_file(teacher / "model.safetensors"))


def test_a_tied_teachers_student_is_tied_again(run, teacher, tmp_path):
    model, _ = build_student(open_teacher(teacher), ModelConfig(tmix="rad_rwkv7"))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * 1.01)
    save_model(model, tmp_path / "close")
    assert run("convert_to_safetensors.py", tmp_path / "close", tmp_path / "out", "--retie") == (0, "")
    tied = load_model(tmp_path / "out")
    assert tied.config.tie_word_embeddings and tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, model.model.embed_tokens.weight)
    code, said = run("convert_to_safetensors.py", tmp_path / "out", tmp_path / "again", "--retie")
    assert code == 2 and "tied already" in said


def test_a_head_of_its_own_is_not_tied(run, teacher, tmp_path):
    save_model(build_student(open_teacher(teacher), ModelConfig(tmix="rad_rwkv7"))[0], tmp_path / "apart")
    code, said = run("convert_to_safetensors.py", tmp_path / "apart", tmp_path / "out", "--retie")
    assert code == 2 and "another matrix than its embedding" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "target"),
    [
        ("convert_hf_to_pth.py", "x.pth"),
        ("convert_to_safetensors.py", "x.safetensors"),
        ("convert_to_safetensors.py", "folder"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, teacher, tmp_path, script, target):
    with largest_file(100_000):
        code, said = run(script, teacher, tmp_path / target)
    assert (code, said.count("\n")) == (2, 1)
    assert str(tmp_path / target) in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_a_stage_is_saved_is_an_os_error(teacher, tmp_path):
    student, _ = build_student(open_teacher(teacher), ModelConfig(groupnorm_att=0))
    with largest_file(100_000), pytest.raises(OSError, match="stage"), unfinished_folder(tmp_path / "stage") as partial:
        save_model(student, partial)
    assert [path.name for path in tmp_path.iterdir()] == ["stage.partial"]


def test_an_interrupted_conversion_leaves_nothing(run, teacher, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("radlads.checkpoint.weights.SafetensorsFolder.__getitem__", interrupted)
    for script, target in [("convert_hf_to_pth.py", "x.pth"), ("convert_to_safetensors.py", "folder")]:
        code, said = run(script, teacher, tmp_path / target)
        assert (code, said) == (130, f"{script}: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["convert_hf_to_pth.py", "convert_to_safetensors.py"])
def test_errors_are_sentences(run, tmp_path, script):
    code, said = run(script, tmp_path / "nowhere", tmp_path / "out.pth")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(script)


_PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("RADLADS_CHECKPOINT_GB" not in os.environ, reason="set RADLADS_CHECKPOINT_GB, e.g. to 2, to run")
def test_memory_is_bounded_whatever_the_checkpoints_size(tmp_path):
    num_tensors = round(float(os.environ["RADLADS_CHECKPOINT_GB"]) * 10**9 / 2**27)
    weights = {f"layer.{number}": torch.full((2**26,), float(number), dtype=torch.bfloat16) for number in range(2)}
    weights |= {f"layer.{number}": weights["layer.1"] for number in range(2, num_tensors)}
    write_safetensors(InMemory(weights), list(weights), tmp_path / "in.safetensors")
    ways = [
        ("convert_hf_to_pth.py", "in.safetensors", "x.pth"),
        ("convert_to_safetensors.py", "x.pth", "x.safetensors"),
        ("convert_to_safetensors.py", "x.pth", "shards"),
        ("convert_hf_to_pth.py", "shards", "y.pth"),
    ]
    for script, source, target in ways:
        command = [sys.executable, "-c", _PEAK, ROOT / script, tmp_path / source, tmp_path / target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak_gb = int(done.stdout.split()[-1]) * 1024 / 1e9
        print(f"{script} {source} {target}: {peak_gb:.2f} GB at most")
        assert peak_gb < 2
    assert torch.equal(PthFile(tmp_path / "y.pth")["layer.0"][-5:], weights["layer.0"][-5:])
    assert torch.equal(PthFile(tmp_path / "y.pth")[f"layer.{num_tensors - 1}"], weights["layer.1"])


class InMemory(dict):
    """Tensors in memory with the interface of stored ones."""

    def info(self, name):
        return pth.TensorInfo(tuple(self[name].shape), self[name].dtype)
