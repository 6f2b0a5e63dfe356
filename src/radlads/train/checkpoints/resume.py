"""Where a stage begins: anew, or at one of its checkpoints, and only at one of the same run."""

import hashlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from radlads.checkpoint.manifest import MANIFEST
from radlads.checkpoint.own_files import MARK, check_marked, check_names, remove_each
from radlads.checkpoint.weights import EMBEDDING, HEAD
from radlads.config.compare import deciding, differences
from radlads.config.schema import Config
from radlads.console import Console
from radlads.data.binidx import BinIdxReader
from radlads.data.sampling import magic_prime
from radlads.files import read_json
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.checkpoints.snapshots import (
    CHECKPOINT_FILES,
    CHECKPOINTS,
    RUN,
    checkpoints_in,
    fault_of,
    remove,
    remove_incomplete,
)
from radlads.train.corpora.run_corpora import HELDOUT, TRAINING, corpus_differences, describe_corpora
from radlads.train.corpora.samples import sequences_per_step, steps_of
from radlads.train.engines.rows import gathered
from radlads.train.logging.loggers import WANDB_RUN
from radlads.train.logging.metrics_csv import METRICS, SPEED
from radlads.train.processes.group import ALONE, Processes

# Of every tensor, so that models that differ are told apart without reading all of a large one
_NUMBERS_COMPARED = 1024
_MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        "lr_init",
        "lr_final",
        "lr2_init",
        "lr2_final",
        "gradient_clip_val",
        "log_every_n_steps",
        "spike_factor",
        "compile",
    )
)
"""What may be another value than the checkpoint's where the user names it: neither data nor schedule shift by it."""


SELECTION = "layers.json"
"""What a stage that selects its softmax layers has found, in its folder."""
STAGE_FILES = (
    *("config.yaml", SELECTION, "config.json", "model*.safetensors", "model.safetensors.index.json", MANIFEST),
    *(
        METRICS,
        SPEED,
        "heldout.csv",
        WANDB_RUN,
        "wandb/**",
        "tensorboard/events.out.tfevents.*",
        "tensorboard/hparams.yaml",
    ),
    *(f"{CHECKPOINTS}/step-*/{name}" for name in CHECKPOINT_FILES),
)
"""What a run leaves in its unfinished folder; anything else there is its user's."""

_SPREAD = frozenset(
    f"train.{name}"
    for name in ("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "strategy", "ds_bucket_mb")
)


def describe_run(
    config: Config,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    corpora: Iterable[tuple[BinIdxReader, Fraction]],
    processes: Processes = ALONE,
    *,
    heldout: BinIdxReader | None = None,
) -> dict[str, Any]:
    """What tells a run apart: what its configuration decides, the models it starts from, the tokens it trains on and
    those of the held-out corpus, if it has one.

    Not how a step's sequences are spread over micro-batches and processes: the order of the data does not depend on it.
    """
    corpora = list(corpora)
    dtype = torch.bfloat16 if config.train.precision == "bf16-true" else torch.float32
    models: dict[str, Any] = {"student at the start": fingerprint(student, dtype)}
    models["teacher"] = fingerprint(teacher, dtype) if teacher else None
    kept = {key: value for key, value in deciding(config).items() if key not in _SPREAD}
    sequences = {"sequences in a step": sequences_per_step(config.train, processes)}
    lengths = [reader.num_tokens - config.train.heldout_tail_tokens for reader, _ in corpora]
    anew = _decided_anew(config, student, lengths, sequences["sequences in a step"])
    return kept | sequences | models | describe_corpora(corpora, heldout) | anew


def _decided_anew(config: Config, student: RadladsForCausalLM, lengths: list[int], rows: int) -> dict[str, Any]:
    """What earlier versions decided otherwise, where that makes a difference: there their checkpoints, which lack it,
    are another run's, and everywhere else they are gone on with.

    lengths: tokens of each corpus. rows: sequences in a step.
    """
    train, model, context = config.train, student.config, config.model.ctx_len
    budget = train.my_exit_tokens or sum(lengths)
    steps = steps_of(budget, rows * context)
    multiples = [n for n in lengths if n % context == 0 and n > 3 * context]
    primes = [p for n in multiples if (p := magic_prime(n, context)) != magic_prime(n - 1, context)]
    anew: dict[str, Any] = {}
    if steps != max(1, round(budget / (rows * context))):
        anew["optimizer steps"] = steps
    if primes and train.magic_prime in (0, "auto"):
        anew["magic primes"] = primes
    if "full_attention" in model.layer_types:
        anew["softmax layers"] = "count in the loss of align, have the mixers' rate"
    if "rad_rwkv7" in model.time_mixers and model.balance_state == model.groupnorm_att:
        anew["scale of RAD-RWKV7"] = "by groupnorm_att"
    return anew


def fingerprint(model: RadladsForCausalLM, dtype: torch.dtype = torch.float32) -> str:
    """A hash of numbers from all over every parameter, rounded to `dtype`, but for a head that is the embedding or its
    copy. All processes have to take part for a sharded model."""
    numbers = {name: _numbers(parameter, dtype) for name, parameter in model.named_parameters()}
    if HEAD in numbers and torch.equal(numbers[HEAD], numbers[EMBEDDING]):
        del numbers[HEAD]
    digest = hashlib.sha256()
    for name, each in numbers.items():
        digest.update(name.encode())
        digest.update(each.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _numbers(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    every = max(1, parameter.numel() // _NUMBERS_COMPARED)
    return gathered(parameter).flatten()[::every].to(dtype).float().cpu().contiguous()


def first_checkpoint(setting: str, stage_folder: Path, run: dict[str, Any], console: Console) -> Path | None:
    """The checkpoint that train.resume = `setting` means, whole and of this run; None for a start from the beginning.

    Call with the stage's unfinished folder locked. What is of no use to the run is removed from it, and said so.
    Raises ValueError if the checkpoint is damaged, naming the one before; if it is another run's, with all that
    differs; if there is none where one is named; or if what would have to be removed was not written by a run.
    """
    held = checkpoints_in(stage_folder)
    remove_incomplete(stage_folder)
    if setting == "never" or (setting == "auto" and not held):
        _empty(stage_folder, held, console)
        return None
    chosen = held[-1] if setting == "auto" else _named(Path(setting), stage_folder, held)
    _check_whole(chosen, held)
    _check_same_run(chosen, run, may_change=frozenset() if setting == "auto" else _MAY_CHANGE, console=console)
    if chosen not in held:
        _empty(stage_folder, held, console)
    for newer in [each for each in held if chosen in held and held.index(each) > held.index(chosen)]:
        console.line(f"{newer} is removed: the run goes on from an earlier checkpoint")
        remove(newer)
    return chosen


def _empty(stage_folder: Path, held: list[Path], console: Console) -> None:
    check_marked(stage_folder)
    check_names(stage_folder, STAGE_FILES)
    if written := [path for path in stage_folder.iterdir() if path.name != MARK]:
        what = f"{len(held)} checkpoints" if held else "no checkpoint"
        console.line(f"{stage_folder}: an unfinished run ({what}) is thrown away and started over")
        remove_each(written)


def check_named(path: Path) -> None:
    """Raise ValueError if train.resume names no folder."""
    if not path.is_dir():
        raise ValueError(f"train.resume {path} is not a checkpoint's folder: name one, or auto, or never")


def _named(path: Path, stage_folder: Path, held: list[Path]) -> Path:
    """The checkpoint at `path`, by its name in `held` if it is one of the stage's own."""
    check_named(path)
    for own in held:
        if own.samefile(path):
            return own
    if path.resolve().is_relative_to(stage_folder.resolve()):  # which is emptied where it has no checkpoint of its own
        raise ValueError(
            f"train.resume {path} lies in the unfinished run, but is not named step-NUMBER: rename it, or move it out"
        )
    if held:
        raise ValueError(
            f"{stage_folder} holds checkpoints of its own, and train.resume names another, {path}: remove the folder, "
            "or choose another one with --train.proj_name"
        )
    return path


def _check_whole(chosen: Path, held: list[Path]) -> None:
    fault = fault_of(chosen)
    if fault is None:
        return
    before = held[: held.index(chosen)] if chosen in held else []
    sound = next((each for each in reversed(before) if fault_of(each) is None), None)
    again = "start over with --train.resume never (radlads demo: --set train.resume=never)"
    if sound is not None:
        again = f"go on from the one before with --train.resume {sound} (radlads demo: --set train.resume={sound})"
    raise ValueError(f"the checkpoint {chosen} cannot be used, as {fault}: {again}")


def _check_same_run(chosen: Path, run: dict[str, Any], *, may_change: frozenset[str], console: Console) -> None:
    held = read_json(chosen / RUN)
    there, here = ({k: v for k, v in each.items() if k not in (TRAINING, HELDOUT)} for each in (held, run))
    kept = {key: value for key, value in there.items() if key not in may_change}
    different = differences(kept, {key: value for key, value in here.items() if key not in may_change})
    if different := different + corpus_differences(held, run):
        raise ValueError(
            f"{chosen} is a checkpoint of a different run ({'; '.join(different)}): set back what differs, choose "
            "another folder with --train.proj_name, or throw that run away with --train.resume never"
        )
    for difference in differences(there, here):
        console.line(f"from {chosen.name} on: {difference}")
