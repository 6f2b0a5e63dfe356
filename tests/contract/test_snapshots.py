"""Names that others depend on: state-dict keys and shapes, and configuration keys. To accept a change on purpose:

python tests/contract/test_snapshots.py
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from radlads.config.schema import Config
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


def state_dicts() -> dict[str, dict[str, list[int]]]:
    models = {name: RadladsForCausalLM(RadladsConfig(**SIZES, **keys)) for name, keys in STACKS.items()}
    return {name: {key: list(value.shape) for key, value in m.state_dict().items()} for name, m in models.items()}


def config_keys(cls=Config, prefix="") -> list[str]:
    keys = []
    for entry in fields(cls):
        nested = is_dataclass(entry.type)
        keys += config_keys(entry.type, f"{prefix}{entry.name}.") if nested else [prefix + entry.name]
    return keys


SNAPSHOTS = {"state_dicts": state_dicts, "config_keys": config_keys}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_names_are_those_of_the_snapshot(name):
    assert SNAPSHOTS[name]() == json.loads((FOLDER / f"{name}.json").read_text())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, taken in SNAPSHOTS.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(taken(), indent=1) + "\n")
