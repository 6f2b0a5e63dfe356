"""What of a configuration decides a result: keys that were added later, left out, change no file of before."""

import hashlib
import json
from pathlib import Path

import pytest

from radlads.config import load_config
from radlads.config.compare import HashedSection, deciding, differences
from radlads.convert.student import student_config
from radlads.inference.saved_state import _decisive
from radlads.model.configuration import RadladsConfig
from radlads.recipes.conversion_folder import decisive_settings
from radlads.train.fit import recipe_hash

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# With the hashes of commit e307c4f, which had no model.softmax_layers, model.layer_mixers and model.mixer
RUNS = {
    "defaults": ([], {}, "5d6396e0eebdbaff", "94856d809db7d0de"),
    "qwerky7": (
        ["qwen7b", "qwerky7", "qwen7binstructteacher", "distill2"],
        {},
        "314473c17532ab7e",
        "2f675c2b2ff1e079",
    ),
    "layers set apart": (
        ["rad_rwkv6"],
        {"model.tmix2": "rad_rwkv7", "model.inv_other_layer_ratio": 3, "model.preserve_last_n_layers": 1},
        "37e22ca4557bb8e1",
        "104e6e30c85315bb",
    ),
}
NEW_KEYS = {"model.softmax_layers": "every:2", "model.layer_mixers": "0:qwen2", "model.mixer.window": 64}


@pytest.mark.parametrize("run", RUNS)
def test_recipes_and_identities_are_those_of_earlier_versions(run):
    names, overrides, recipe, identity = RUNS[run]
    config = load_config([CONFIGS / f"{name}.yaml" for name in names], overrides)
    assert recipe_hash(deciding(config), "parent") == recipe
    assert recipe_hash(HashedSection(config.model)) == identity


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [(["rad_rwkv7", "rad_rwkv7"], "902df6ef40257c22"), (["rad_rwkv6", "qwen2"], "d5f6f5c8fc52dda6")],
)
def test_saved_states_are_of_the_same_configuration_as_in_earlier_versions(mixers, expected):
    decisive = _decisive(RadladsConfig(**SIZES, time_mixers=mixers))
    assert hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("given", [{}, {"model.mixer.window_tokens": 0, "model.mixer.sink_tokens": 0}])
def test_a_student_without_a_window_is_that_of_earlier_versions(given):
    config = student_config(RadladsConfig(**SIZES), load_config([CONFIGS / "rad_rwkv7.yaml"], given).model)
    assert config.mixer_settings == {} and "mixer_settings" not in _decisive(config)


def test_settings_of_a_window_are_stored():
    model = load_config([CONFIGS / "rad_rwkv7.yaml"], {"model.mixer.window_tokens": 64}).model
    assert student_config(RadladsConfig(**SIZES), model).mixer_settings == {"rad_rwkv7": {"window_tokens": 64}}


def test_a_mixers_settings_decide_a_saved_state():
    own = {"rad_rwkv7": {"window": 64}}
    assert _decisive(RadladsConfig(**SIZES, mixer_settings=own))["mixer_settings"] == own


@pytest.mark.parametrize("key", NEW_KEYS)
def test_new_keys_decide_once_they_are_set(key):
    before, after = load_config([], {}), load_config([], {key: NEW_KEYS[key]})
    assert deciding(after)[key] == NEW_KEYS[key] and key not in deciding(before)
    assert recipe_hash(HashedSection(after.model)) != recipe_hash(HashedSection(before.model))
    told = differences(deciding(before), deciding(after))
    assert told == [f"{key} is None there and {NEW_KEYS[key]!r} here"]


def test_settings_of_a_conversion_are_told_where_only_some_stages_have_them():
    stages = {"align": load_config([], {}), "distill": load_config([], NEW_KEYS), "extend": load_config([], NEW_KEYS)}
    settings = decisive_settings(stages)
    for key, value in NEW_KEYS.items():
        assert settings[key] == {"align": None, "distill": value, "extend": value}
