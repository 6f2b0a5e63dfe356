"""Our files of published names against a table of the released system's values, and our defaults against its own."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from radlads.config import Config, load_config, parse_config
from radlads.config.schema import without_effect

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests" / "published_configs.json").read_text())
"""All values of the released configuration files, of the keys that exist here; the others are other architectures'."""
# The files of the released README's three training commands
README_COMMANDS = [
    ["qwen7b", "qwerky7", "distill1"],
    ["qwen7b", "qwerky7", "qwen7binstructteacher", "distill2"],
    ["qwen7b", "qwerky7", "qwen7binstructteacher", "distill3"],
]
TEACHER_MODEL = "train.teacher.model"
# Accepted and named in a warning, so our own files leave them out
IDLE = {
    *(f"model.{key}" for key in ("classname", "vocab_padding_idx", "attention_type")),
    *(f"train.{key}" for key in ("load_partial", "train_stage", "epoch_save")),
    *(f"{TEACHER_MODEL}.{key}" for key in ("classname", "vocab_padding_idx", "ctx_len", "tmix2")),
}
EXCEPTIONS = {
    ("distill3", "train.proj_suffix"): ("3", "the released README reads the folder ...-3, the file says 4"),
    ("qwerky7", "model.use_tokenshift"): (0, "RAD-RWKV7 has none and ignores the key; its checkpoints say false"),
    ("qwen0b5hfteacher", f"{TEACHER_MODEL}.hf_path"): ("", "read as train.teacher.hf_path"),
    ("qwen7bhfteacher", f"{TEACHER_MODEL}.hf_path"): ("", "read as train.teacher.hf_path"),
    **{
        (name, "train.wandb"): ("", "nothing is sent to a service unless the user says so")
        for name in PUBLISHED["files"]
        if name.startswith("distill") and name != "distill1"
    },
}
DEFAULT_EXCEPTIONS = {
    "model.tmix": ("rad_rwkv7", "x060 is RWKV-6, which is not here"),
    "model.cmix": ("", "the family's own; x060 is RWKV-6's"),
    "model.cmix2": ("", "as cmix"),
    "train.load_model": ("", "means auto"),
    "train.data_type": ("binidx", "the only format here; all released stages use it"),
    "model.vocab_padding_idx": (-1, "no effect; the released default is null"),
    "train.check_val_every_n_epoch": (None, "no effect"),
}


def flat(mapping, prefix=""):
    """Dotted keys and values of a nested mapping."""
    pairs = {}
    for name, value in mapping.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs


DEFAULTS = flat(asdict(Config()))


def expected(*names):
    """Every key as the released files of these names, later over earlier, leave it, but for what is excepted here."""
    values = dict(DEFAULTS)
    for name in names:
        published = flat(PUBLISHED["files"][name])
        values |= {key: value for key, value in published.items() if key not in IDLE}
        if hf_path := published.get(f"{TEACHER_MODEL}.hf_path"):
            values["train.teacher.hf_path"] = hf_path
        values |= {key: ours for (file, key), (ours, _) in EXCEPTIONS.items() if file == name}
    return values


@pytest.mark.parametrize("name", PUBLISHED["files"])
def test_a_file_of_a_published_name_holds_the_published_values(name):
    assert flat(asdict(load_config([ROOT / "configs" / f"{name}.yaml"], {}))) == expected(name)


@pytest.mark.parametrize("names", README_COMMANDS, ids=lambda names: names[-1])
def test_the_released_readmes_commands_resolve_to_the_released_values(names):
    files = [word for name in names for word in ("-c", str(ROOT / "configs" / f"{name}.yaml"))]
    assert flat(asdict(parse_config(files, write=pytest.fail))) == expected(*names)


def test_a_key_that_no_file_sets_has_the_released_default():
    released = flat(PUBLISHED["defaults"])
    ours = {key: (DEFAULTS[key], DEFAULT_EXCEPTIONS.get(key, (released[key],))[0]) for key in released}
    assert {key: found for key, (found, right) in ours.items() if found != right} == {}


def test_every_exception_is_one():
    for (name, key), (ours, _) in EXCEPTIONS.items():
        assert flat(PUBLISHED["files"][name]).get(key, DEFAULTS[key]) != ours
    for key, (ours, _) in DEFAULT_EXCEPTIONS.items():
        assert flat(PUBLISHED["defaults"])[key] != ours


@pytest.mark.parametrize("name", PUBLISHED["files"])
def test_a_published_file_itself_loads_and_its_idle_keys_are_named(name, tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(PUBLISHED["files"][name]))
    assert set(without_effect(load_config([tmp_path / "file.json"], {}))) <= IDLE


def test_a_teacher_that_only_its_model_section_names_is_the_teacher():
    named = {"train.teacher.model.hf_path": "Qwen/Qwen2.5-7B-Instruct"}
    teacher = load_config([], named).train.teacher
    assert (teacher.hf_path, teacher.model.hf_path) == ("Qwen/Qwen2.5-7B-Instruct", "")


@pytest.mark.parametrize(
    ("name", "sequences"),
    [
        *(("distill1", 32), ("distill2", 96), ("distill3", 96), ("distill3-1024", 96), ("distill3-2048", 96)),
        *(("distill3-4096", 96), ("distill3-8192", 96), ("distill3-16384", 16)),
    ],
)
def test_sequences_per_step_on_the_published_eight_gpus(name, sequences):
    train = load_config([ROOT / "configs" / f"{name}.yaml"], {}).train
    assert train.micro_bsz * train.accumulate_grad_batches * train.devices == sequences
