"""A model's folder may be anybody's: none of its code is run, and nothing that it points at is published."""

import json
import shutil
import sys

import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedModel

from radlads.checkpoint import tokenizer_files
from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.published_export import convert_to_published
from radlads.checkpoint.weight_files import convert_to_safetensors
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.model import registry
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes import single_stage
from radlads.recipes.hub_upload import uploaded_files

LAST_TOKEN = """
from typing import NamedTuple

import torch
from torch import nn

class State(NamedTuple):
    last: torch.Tensor

class TMix_theirs(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, state, v_first, shared):
        return self.out(x), State(x[:, -1]), v_first
"""
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    return tiny.changeable_export(teacher, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def model(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Kernels that a config.json names


@pytest.fixture
def loaded_kernels(monkeypatch):
    """Attention other than torch's that transformers was asked for; it takes such names to its loader of kernels."""
    names, check = [], PreTrainedModel._check_and_adjust_attn_implementation

    def checked(self, attn_implementation, *arguments, **keys):
        if attn_implementation not in (None, "sdpa", "eager"):
            names.append(attn_implementation)
        return check(self, attn_implementation, *arguments, **keys)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", checked)
    return names


@pytest.mark.parametrize("key", KERNEL_KEYS)
def test_a_config_json_chooses_no_kernel(model, loaded_kernels, key):
    change_json(model / "config.json", **{key: "evil/kernel"})
    assert load_model(model).config._attn_implementation == "sdpa"
    RadladsForCausalLM(RadladsConfig.from_pretrained(model))
    assert loaded_kernels == []


def test_the_fixture_sees_a_kernel_that_is_loaded(loaded_kernels):
    config = RadladsConfig(**tiny.SIZES)
    config._attn_implementation = "evil/kernel"
    with pytest.raises((ImportError, ValueError)):
        RadladsForCausalLM(config)
    assert loaded_kernels == ["evil/kernel"]


def test_a_caller_still_chooses_attention(model):
    assert RadladsConfig.from_pretrained(model, attn_implementation="eager")._attn_implementation == "eager"


def test_a_teachers_kernel_is_never_asked_for(teacher, tmp_path, loaded_kernels):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    change_json(folder / "config.json", attn_implementation="evil/kernel")
    RadladsForCausalLM(open_teacher(folder).config)
    assert loaded_kernels == []


def test_converted_folders_name_no_code(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    change_json(folder / "config.json", auto_map={"AutoModel": "evil.Evil"}, _attn_implementation="evil/kernel")
    convert_to_safetensors(folder, tmp_path / "out")
    assert not {"auto_map", "_attn_implementation"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


# Mixers that a config.json names


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A model's folder with a mixer of its own in it, which is the working directory, as under `python -m`."""
    folder = tmp_path / "theirs"
    (folder / "tmix").mkdir(parents=True)
    (folder / "tmix" / "tmix_theirs.py").write_text("open('was_run', 'w').close()\n" + LAST_TOKEN)
    tiny.save_tokenizer(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in ("_named_by_user", "_mixer_paths"):
        monkeypatch.setattr(registry, name, set())
    yield folder
    for module in [name for name in sys.modules if name.partition(".")[0] == "tmix"]:
        del sys.modules[module]


@pytest.fixture
def saved(theirs):
    """The folder, with the model in it too."""
    registry.name_mixers("theirs")
    torch.manual_seed(0)
    save_model(RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=["theirs"] * 3)), theirs)
    registry._named_by_user.clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "tmix"]:
        del sys.modules[module]
    (theirs / "was_run").unlink()
    return theirs


GENERATE = ["generate", ".", "--prompt", "ab", "--max-tokens", "2", "--device", "cpu"]


def test_a_mixer_in_the_working_directory_is_not_run_for_a_models_sake(saved, capsys):
    assert main(GENERATE) == 2
    expected = "the model names the mixer 'theirs', but code in the working directory is not run for that: if you trust"
    assert expected in capsys.readouterr().err
    assert not (saved / "was_run").exists() and sys.path[0] == str(saved)


def test_it_is_run_where_the_user_names_its_folder(saved):
    assert main([*GENERATE, "--mixer-path", "."]) == 0
    assert (saved / "was_run").exists()


def test_a_mixer_on_the_import_path_is_found_from_anywhere(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(saved), *GENERATE[2:]]) == 0


def test_a_working_directory_that_pythonpath_names_in_full_is_the_users(saved, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f":.:{saved}")
    load_model(saved)
    assert (saved / "was_run").exists()


@pytest.mark.parametrize("entries", ["", ".", ":", "tmix"])
def test_a_relative_pythonpath_is_not(saved, monkeypatch, entries):
    monkeypatch.setenv("PYTHONPATH", entries)
    with pytest.raises(ValueError, match="is not run for that"):
        load_model(saved)


def test_a_scripts_own_folder_is_the_users(saved, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(saved / "script.py"), raising=False)
    load_model(saved)


def test_training_runs_the_mixer_that_its_configuration_names(saved, teacher, tmp_path, monkeypatch):
    tiny.corpus(tmp_path / "train")
    models = []
    monkeypatch.setattr(single_stage, "run_stage", lambda config, *two, **rest: models.extend(two[:2]))
    keys = {"model.tmix": "theirs", "train.load_model": str(saved), "train.teacher.hf_path": str(teacher)}
    single_stage.train_stage(tiny.stage_config(tmp_path, "distill", **keys), tiny.Silent())
    assert type(models[0].model.layers[0].self_attn).__name__ == "TMix_theirs"


def test_train_takes_a_mixer_path(saved, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(registry, "add_mixer_path", asked.append)
    assert main(["train", "--mixer-path", "lib", "--train.teacher.hf_path", "nowhere"]) == 2
    assert [str(path) for path in asked] == ["lib"]


def test_a_mixer_path_without_mixers_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a", "--mixer-path", str(tmp_path)]) == 2
    assert f"{tmp_path} has neither tmix/ nor cmix/: name the folder that holds them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.b", "../x", "", "x y"])
def test_a_name_that_is_no_modules_is_unknown(theirs, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # tmix/ is on the import path then
    with pytest.raises(ValueError, match="no mixer named"):
        RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=[name] * 3))


# Files that are copied


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("a key")
    return tmp_path / "secret"


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_not_exported(model, secret, tmp_path, capsys, name):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert main(["export", str(model), str(tmp_path / "out")]) == 2
    assert f"{model / name} is a link to {secret}, outside its folder: put a copy there" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("convert", [convert_to_safetensors, convert_to_published])
def test_no_conversion_copies_what_a_link_leads_to(model, secret, tmp_path, convert):
    (model / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ValueError, match="outside its folder"):
        convert(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_demo_says_so_before_it_begins(teacher, secret, tmp_path, capsys):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    (folder / "NOTICE").symlink_to(secret)
    assert main(["demo", "--teacher", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "outside its folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_upload_takes_no_link_out_of_its_folder(model, secret):
    (model / "README.md").write_text("# A model\n")
    (model / "[x]*.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="outside its folder"):
        uploaded_files(model)


def test_links_within_the_folder_and_to_the_hubs_blobs_are_copied(teacher, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(teacher, snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "tokenizer.json").rename(snapshot.parents[1] / "blobs" / "2")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/2")
    (snapshot / "LICENSE").write_text("as you like")
    (snapshot / "LICENCE").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(snapshot)
    tokenizer_files.check_copyable(tmp_path / "link")
    (tmp_path / "out").mkdir()
    tokenizer_files.copy_tokenizer(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_a_tokenizers_own_code_is_neither_copied_nor_named(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    code = {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
    }
    change_json(folder / "tokenizer_config.json", **code)
    export(tiny.moved_student(folder, tmp_path).eval(), folder, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert kept == {"eos_token": "<|end|>", "tokenizer_class": "EvilTokenizer"}
    expected = AutoTokenizer.from_pretrained(teacher)("a word")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("a word")["input_ids"] == expected
