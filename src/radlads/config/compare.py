"""What of a configuration decides a result, and where two differ. Leaves what models and data hold to others."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from radlads.config.schema import Config

_PLACES = ("proj_dir", "proj_name", "proj_suffix0", "proj_suffix", "wandb")
_CHECKPOINTS = ("resume", "checkpoint_every_minutes", "checkpoint_every_steps", "keep_checkpoints")
# What a step computes again, or records: what to change where memory is short
_MEMORY = ("activation_checkpointing", "grad_cp", "cuda_graphs")
# Told apart by what they hold
_ORIGINS = ("load_model", "data_file", "validation_data_file", "teacher.path", "teacher.hf_path")
IDLE = frozenset(f"train.{name}" for name in (*_PLACES, *_CHECKPOINTS, *_MEMORY, *_ORIGINS)) | {"model.hf_path"}
"""Dotted keys that say where things are or go, when checkpoints are written, or what memory is spent on, and so decide
nothing."""


def deciding(config: Config) -> dict[str, Any]:
    """Every dotted key but the idle ones, with its value."""
    return {key: value for key, value in _flat(asdict(config)).items() if key not in IDLE}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A phrase for each key whose values differ, sorted by key; a key that is missing has the value None."""
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    return [f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
