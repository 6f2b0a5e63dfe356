"""What others depend on: state-dict keys and shapes, configuration keys, and the numbers that setup draws from a seed,
without which an unfinished align stage does not go on. To accept a change on purpose:

python tests/contract/test_snapshots.py
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from old_runs import FILES

from radlads.config.schema import Config, ModelConfig
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

FOLDER = Path(__file__).with_name("snapshots")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STACKS = {
    "qwen2": {"time_mixers": ["qwen2"] * 2},
    "rad_rwkv6": {"time_mixers": ["rad_rwkv6"] * 2, "gate_rank_type": 1, "use_rope": False},
    "rad_rwkv7": {"time_mixers": ["rad_rwkv7"] * 2},
    "rad_rwkv7_group_norm": {"time_mixers": ["rad_rwkv7"] * 2, "balance_state": False, "groupnorm_att": True},
}
STUDENTS = {
    "rad_rwkv6": {"tmix": "rad_rwkv6"},
    "rad_rwkv7": {"groupnorm_att": 0, "gate_rank_type": 2},
    "rad_rwkv7_group_norm": {"balance_state": 0, "gate_rank_type": 2},
}


def state_dicts() -> dict[str, dict[str, list[int]]]:
    models = {name: RadladsForCausalLM(RadladsConfig(**SIZES, **keys)) for name, keys in STACKS.items()}
    return {name: {key: list(value.shape) for key, value in m.state_dict().items()} for name, m in models.items()}


def config_keys(cls=Config, prefix="") -> list[str]:
    keys = []
    for entry in fields(cls):
        nested = is_dataclass(entry.type)
        keys += config_keys(entry.type, f"{prefix}{entry.name}.") if nested else [prefix + entry.name]
    return keys


def fresh_values() -> dict[str, dict[str, list[float]]]:
    """Three numbers of every parameter that a student of the old files' teacher does not have from it."""
    source, drawn = open_teacher(FILES / "teacher"), {}
    for name, keys in STUDENTS.items():
        torch.manual_seed(0)
        own = build_student(source, ModelConfig(**keys))[0].named_parameters()
        fresh = {key: value.flatten() for key, value in own if "self_attn" in key and "_proj." not in key}
        drawn[name] = {key: value[:: -(-len(value) // 3)].tolist() for key, value in fresh.items()}
    return drawn


SNAPSHOTS = {"state_dicts": state_dicts, "config_keys": config_keys}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_names_are_those_of_the_snapshot(name):
    assert SNAPSHOTS[name]() == json.loads((FOLDER / f"{name}.json").read_text())


def test_setup_draws_the_numbers_of_the_snapshot():
    expected = json.loads((FOLDER / "fresh_values.json").read_text())
    found = fresh_values()
    assert {name: [*keys] for name, keys in found.items()} == {name: [*keys] for name, keys in expected.items()}
    for name, values in expected.items():
        for key, numbers in values.items():
            assert found[name][key] == pytest.approx(numbers, abs=1e-6), (name, key)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, taken in {**SNAPSHOTS, "fresh_values": fresh_values}.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(taken(), indent=1) + "\n")
