"""What of a configuration decides a result, and where two differ. Leaves what models and data hold to others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from radlads.config.schema import ON_POLICY_KEYS, Config, ModelConfig, TrainConfig

_PLACES = ("proj_dir", "proj_name", "proj_suffix0", "proj_suffix", "wandb")
_CHECKPOINTS = ("resume", "checkpoint_every_minutes", "checkpoint_every_steps", "keep_checkpoints")
# What a step computes again, or records: what to change where memory is short
_MEMORY = ("activation_checkpointing", "grad_cp", "cuda_graphs")
# Told apart by what they hold
_ORIGINS = ("load_model", "data_file", "validation_data_file", "teacher.path", "teacher.hf_path")
IDLE = frozenset(f"train.{name}" for name in (*_PLACES, *_CHECKPOINTS, *_MEMORY, *_ORIGINS)) | {"model.hf_path"}
"""Dotted keys that say where things are or go, when checkpoints are written, or what memory is spent on, and so decide
nothing."""
_ADDED = ("softmax_layers", "layer_mixers", "mixer")
"""Keys of a model section that files of earlier versions lack. At their default they decide nothing, so that what was
begun with an earlier version can be gone on with."""
_ADDED_DEFAULTS = {
    f"{section}.{name}": getattr(ModelConfig(), name) for section in ("model", "train.teacher.model") for name in _ADDED
} | {f"train.{name}": getattr(TrainConfig(), name) for name in ON_POLICY_KEYS}


@dataclass(frozen=True, repr=False)
class HashedSection:
    """A model section as recipe_hash is to see it: its repr leaves out the added keys that are at their default."""

    section: ModelConfig

    def __repr__(self) -> str:
        values = {entry.name: getattr(self.section, entry.name) for entry in fields(self.section)}
        added = {name: _ADDED_DEFAULTS[f"model.{name}"] for name in _ADDED}
        told = {name: value for name, value in values.items() if name not in added or value != added[name]}
        return f"ModelConfig({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def deciding(config: Config) -> dict[str, Any]:
    """Every dotted key with its value, but for the idle ones and those that earlier versions lack and are not set."""
    return {
        key: value
        for key, value in _flat(asdict(config)).items()
        if key not in IDLE and not (key in _ADDED_DEFAULTS and value == _ADDED_DEFAULTS[key])
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A phrase for each key whose values differ, sorted by key; a key that is missing has the value None."""
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    return [f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
