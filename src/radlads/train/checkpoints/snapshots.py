"""Checkpoints inside a stage: folders `step-000123` that hold all that a run needs to go on, bit for bit.

A checkpoint is a model folder (config.json, model.safetensors) with the optimisers' tensors (state.safetensors), where
the run stands (position.json), what run it is (run.json), its logs (train/logging/loggers.py), and manifest.json with a
hash of each. Of a model in shards there is a file for each process instead, with its rows of weights and state
(shard-00000-of-00008); any number of processes goes on from either kind. A checkpoint has its name once it is complete.
The frozen teacher is in none. Leaves to others when to write one, and which to take.
"""

import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.manifest import MANIFEST, versions
from radlads.checkpoint.model_folder import save_model
from radlads.checkpoint.own_files import MARK, check_names, refuse_links, remove_folder
from radlads.checkpoint.safetensors_files import WEIGHTS_FILE
from radlads.checkpoint.safetensors_writer import file_order, write_safetensors
from radlads.checkpoint.strict_loading import load_strict
from radlads.checkpoint.weights import (
    HeldTensors,
    PrefixedWeights,
    RowShards,
    SafetensorsFolder,
    StoredWeights,
    TensorInfo,
)
from radlads.checksums import sha256
from radlads.distill.heldout import Heldout
from radlads.files import read_json, write_text
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.engine import CheckpointState
from radlads.train.logging.loggers import CARRIED, carry
from radlads.train.processes.group import ALONE, Processes

CHECKPOINTS = "checkpoints"
STATE, POSITION, RUN = "state.safetensors", "position.json", "run.json"
WRITTEN = "written.safetensors"
"""The rows that the student has written for the steps that follow."""
SHARD, WEIGHT = "shard-{:05d}-of-{:05d}.safetensors", "weight."
CHECKPOINT_FILES = (
    *("config.json", WEIGHTS_FILE, STATE, "shard-*.safetensors", WRITTEN, POSITION, RUN, MANIFEST),
    *CARRIED,
)
"""What a checkpoint holds, whole or not; nothing else is removed with one."""
_SHARD_NAME = re.compile(r"shard-\d+-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimiser steps, samples and tokens behind it, seconds spent, each held-out measurement with
    its step and tokens, and the spike guard's numbers, if there is one."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    heldout: tuple[tuple[int, int, Heldout], ...] = ()
    spike_guard: tuple[float, ...] = ()


def checkpoints_in(stage_folder: Path) -> list[Path]:
    """The stage's checkpoints that have their name, by step."""
    found = (stage_folder / CHECKPOINTS).glob("step-*")
    return sorted((path for path in found if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))


def write_checkpoint(
    stage_folder: Path,
    student: RadladsForCausalLM,
    held: CheckpointState,
    position: Position,
    run: Mapping[str, Any],
    processes: Processes = ALONE,
    written: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint of `position` with the random numbers' state as it is now, and return its folder.

    written: of the rows that the student wrote (see OnPolicy.state), the same in all processes. All processes have to
    call this, with what the engine says that they hold: each writes its rows, if they are in rows, else the first
    writes everything. Raises OSError that names the folder if it cannot be written; nothing is left of it then.
    """
    target = stage_folder / CHECKPOINTS / f"step-{position.step:06d}"
    in_rows = held.by == "rows"
    with ExitStack() as opened:
        folder = processes.from_first(lambda: opened.enter_context(unfinished_folder(target, keep_failed=False)))
        hashes = _write_rows(folder, held, processes) if in_rows else {}
        if processes.is_first:
            if not in_rows:
                save_model(student, folder, weights=held.weights)
                buffers = {f"buffer.{name}": buffer for name, buffer in student.named_buffers()}
                _write_state(held.moments, buffers | _random_tensors(), folder / STATE)
            content = {**asdict(position), "optimizers": held.groups, "random": _random_numbers()}
            write_text(folder / POSITION, json.dumps(content) + "\n")
            write_text(folder / RUN, json.dumps(run, indent=2) + "\n")
            if written:
                write_safetensors(HeldTensors(dict(written)), list(written), folder / WRITTEN)
            carry(stage_folder, folder)
            hashes |= {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in (*hashes, MARK)}
            write_text(folder / MANIFEST, json.dumps({"versions": versions(), "sha256": hashes}, indent=2) + "\n")
        elif held.by == "all":
            for part in (held.weights, held.moments):
                for name in file_order(part, part):
                    part[name]
    processes.wait_for_all()
    return target


def _write_rows(folder: Path, held: CheckpointState, processes: Processes) -> dict[str, str]:
    """Write this process's rows, and return the hash of every process's file. OSError in all if one could not write."""
    shard = folder / SHARD.format(processes.rank, processes.size)
    weights = {f"{WEIGHT}{name}": rows for name, rows in held.weights.items()}
    written, fault = {}, ""
    try:
        _write_state(held.moments, weights | (_random_tensors() if processes.is_first else {}), shard)
        written[shard.name] = sha256(shard)
    except OSError as error:
        fault = f"{folder} cannot be written by process {processes.rank}: {error.strerror or error}"
    found = processes.gather((written, fault))
    if faults := [fault for _, fault in found if fault]:
        raise OSError(faults[0])
    return {name: digest for each, _ in found for name, digest in each.items()}


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which loses its name first: a run killed in between leaves none that looks whole.

    Raises ValueError, and leaves it as it is, if it is a link or holds what no run wrote.
    """
    check_names(checkpoint, CHECKPOINT_FILES)
    doomed = checkpoint.with_name(f"{checkpoint.name}.partial")
    checkpoint.rename(doomed)
    remove_folder(doomed, CHECKPOINT_FILES)


def remove_incomplete(stage_folder: Path) -> None:
    """Remove what killed runs have left of checkpoints without their name. Raises ValueError as `remove`."""
    refuse_links(stage_folder / CHECKPOINTS)
    for path in (stage_folder / CHECKPOINTS).glob("step-*.partial"):
        remove_folder(path, CHECKPOINT_FILES)


def remove_all(stage_folder: Path) -> None:
    """Remove a stage's checkpoints, whole or not, and their folder. Raises ValueError as `remove`, before the first."""
    if (stage_folder / CHECKPOINTS).exists():
        remove_folder(stage_folder / CHECKPOINTS, [f"step-*/{name}" for name in CHECKPOINT_FILES])


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their hashes; None if all are as they were written."""
    try:
        hashes = read_json(checkpoint / MANIFEST).get("sha256")
    except (OSError, ValueError):
        hashes = None
    if not isinstance(hashes, dict) or not {POSITION, RUN} <= hashes.keys() or not _has_state(hashes):
        return f"its {MANIFEST} is missing or damaged"
    for name, expected in hashes.items():
        if not (checkpoint / name).is_file():
            return f"its {name} is missing"
        if sha256(checkpoint / name) != expected:
            return f"its {name} is damaged or cut short"
    return None


def read_position(checkpoint: Path) -> Position:
    """Where the checkpoint's run stood."""
    held = read_json(checkpoint / POSITION)
    heldout = tuple((step, tokens, Heldout(**values)) for step, tokens, values in held["heldout"])
    guard = tuple(held.get("spike_guard", ()))
    return Position(held["step"], held["samples"], held["tokens"], held["seconds"], heldout, guard)


def restore_student(checkpoint: Path, student: RadladsForCausalLM) -> None:
    """Copy the checkpoint's weights and buffers into the student, wherever it is and in however many pieces."""
    state = _stored_state(checkpoint)
    if (checkpoint / STATE).is_file():
        load_strict(student, SafetensorsFolder(checkpoint), checkpoint)
    else:
        load_strict(student, PrefixedWeights(state, WEIGHT), checkpoint)
    for name, buffer in student.named_buffers():
        buffer.copy_(state[f"buffer.{name}"])


def written_rows(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint holds of rows that the student wrote, if anything."""
    path = checkpoint / WRITTEN
    return dict(SafetensorsFolder(path)) if path.is_file() else {}


def stored_optimizers(checkpoint: Path) -> tuple[StoredWeights, list[dict[str, Any]]]:
    """The optimisers' tensors, among others, and of each optimiser its groups' settings and the rest of its state."""
    return _stored_state(checkpoint), read_json(checkpoint / POSITION)["optimizers"]


def restore_random_numbers(checkpoint: Path) -> None:
    """Set the random numbers of Python, NumPy and torch, on every GPU too, to where the checkpoint's run had them."""
    held = read_json(checkpoint / POSITION)["random"]
    version, numbers, gauss = held["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = held["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    stored = _stored_state(checkpoint)
    torch.set_rng_state(stored["random.cpu"].clone())
    if "random.cuda.0" in stored and torch.cuda.is_available():
        devices = range(min(torch.cuda.device_count(), sum(name.startswith("random.cuda.") for name in stored)))
        torch.cuda.set_rng_state_all([stored[f"random.cuda.{device}"].clone() for device in devices])


def _write_state(moments: StoredWeights, rest: dict[str, torch.Tensor], path: Path) -> None:
    state = _Joined(moments, HeldTensors(rest))
    write_safetensors(state, list(state), path)


def _has_state(names: Collection[str]) -> bool:
    """Whether the state is among these files: one, or all that the first of several says there are."""
    counts = {int(match[1]) for name in names if (match := _SHARD_NAME.fullmatch(name))}
    return STATE in names or any(all(SHARD.format(rank, n) in names for rank in range(n)) for n in counts)


def _stored_state(checkpoint: Path) -> StoredWeights:
    """The tensors of a checkpoint's state, whole, and its weights too where they are in shards."""
    if (checkpoint / STATE).is_file():
        return SafetensorsFolder(checkpoint / STATE)
    return RowShards([SafetensorsFolder(path) for path in sorted(checkpoint.glob("shard-*.safetensors"))])


def _random_tensors() -> dict[str, torch.Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random.cpu": torch.get_rng_state()} | {f"random.cuda.{n}": state for n, state in enumerate(on_gpus)}


def _random_numbers() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


class _Joined(StoredWeights):
    """Two sets of tensors, none of them in both."""

    def __init__(self, first: StoredWeights, second: StoredWeights):
        self._owner = dict.fromkeys(first, first) | dict.fromkeys(second, second)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._owner[name][name]

    def info(self, name: str) -> TensorInfo:
        return self._owner[name].info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)
