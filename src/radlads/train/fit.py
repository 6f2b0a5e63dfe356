"""Running one stage from a student in memory to a finished stage folder."""

import hashlib
import logging
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.manifest import write_manifest
from radlads.checkpoint.model_folder import save_model
from radlads.config.load import dump_config
from radlads.config.schema import Config, TrainConfig, check_available, checkpointing_of, stage_of
from radlads.console import Console
from radlads.data.binidx import BinIdxReader, TokenSpan
from radlads.data.loader import HeldoutWindows, MixedSamples, TokenSamples, check_vocabulary
from radlads.data.mixture import parse_mixture
from radlads.distill.documents import document_ends
from radlads.distill.fp8_teacher import fp8_copy
from radlads.distill.heldout import Heldout
from radlads.distill.logits import build_stage
from radlads.model.modeling import RadladsForCausalLM, has_triton
from radlads.model.registry import is_registered
from radlads.train.callbacks import HeldoutCallback, Progress
from radlads.train.checkpointing import Checkpointing
from radlads.train.lightning_module import StageModule
from radlads.train.metrics_csv import METRICS, MetricsCsv
from radlads.train.optim import weights_to_keep
from radlads.train.resume import describe_run, first_checkpoint
from radlads.train.snapshots import CHECKPOINTS, Position, read_position, restore_student
from radlads.train.stopping import StopRequests
from radlads.train.watched_corpora import WatchedCorpora

# run_stage casts the weights for bf16-true: Lightning's own would also make bf16 the default type of every tensor that
# a model makes on its way, RoPE frequencies among them
_LIGHTNING_PRECISION: dict[str, Any] = {
    "bf16": "bf16-mixed",
    "bf16-true": "32-true",
    "fp32": "32-true",
    "32": "32-true",
}
_OLDEST_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class StageResult:
    """What a stage did. seconds: wall time of the fit, held-out measurements included, and of the runs that it went on
    with. resumed: whether it began at a checkpoint."""

    folder: Path
    tokens: int
    seconds: float
    heldout: Heldout | None
    resumed: bool = False


def run_stage(
    config: Config,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    folder: Path,
    console: Console,
    *,
    parent: str,
    recipe: str = "",
) -> StageResult:
    """Train `student` in place by the stage `config` describes and write the finished stage to `folder`.

    `parent` says what the student started from, `recipe` fingerprints all that decides the result; both go into the
    manifest. An unfinished run of the same stage is gone on with, exactly, at its newest checkpoint (train.resume).
    Under bf16-true both models are in bf16 from then on, and so is the folder. Raises ValueError if the folder exists,
    holds another unfinished run, or is in use, the data does not fit, the stage lacks its teacher, the loss is not
    finite, or the GPU's memory is too small; the folder then stays `NAME.partial`. Raises Stopped, a SystemExit, after
    a checkpoint if a signal asks for it.
    """
    train = config.train
    check_available(config)
    stage = build_stage(train, end_ids=_document_ends(config, student, teacher))
    if stage.needs_teacher and teacher is None:
        raise ValueError(f"the {stage.name} stage needs a teacher: set train.teacher.hf_path to its folder or hub name")
    samples, num_steps = training_samples(config, student.config.vocab_size)
    heldout = heldout_batches(config, student.config.vocab_size)
    run = describe_run(config, student, teacher, open_corpora(train))
    module = StageModule(stage, student, teacher if stage.needs_teacher or heldout else None, train, num_steps)
    with StopRequests() as stop:
        with unfinished_folder(folder, keep_earlier=True) as partial:
            begin = first_checkpoint(train.resume, partial, run, console)
            position = _begin(begin, module, partial, console)
            (partial / "config.yaml").write_text(dump_config(config))
            measured = _heldout_callback(heldout, train, partial, position)
            checkpointing = Checkpointing(
                train, partial, run, stop, console, measured=measured, begin=begin, position=position
            )
            progress = Progress(console, len(samples) * config.model.ctx_len)
            callbacks: list[L.Callback] = [each for each in (progress, measured, checkpointing) if each is not None]
            trainer = build_trainer(train, partial, callbacks, first_step=position.step)
            watched = WatchedCorpora(samples, [reader for reader, _ in open_corpora(train)], first=position.samples)
            _train(trainer, module, DataLoader(watched, batch_size=train.micro_bsz), config)
            seconds = checkpointing.seconds()
            last = measured.history[-1][2] if measured else None
            facts = {"stage": stage.name, "parent": parent, "recipe": recipe, "tokens": module.tokens_done}
            _write_stage(student, partial, **facts, seconds=seconds, heldout=vars(last) if last else None)
        # Only now: a run that is killed before its folder has the name still needs them
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        if stop.received is not None:
            console.line(f"{stop.received.name}: stopped, with the stage finished in {folder}")
            raise stop.stopped()
    return StageResult(folder, module.tokens_done, seconds, last, begin is not None)


def _begin(checkpoint: Path | None, module: StageModule, stage_folder: Path, console: Console) -> Position:
    """Bring weights, counts and metrics.csv to where the checkpoint's run stood, saying so; the rest follows later."""
    if checkpoint is None:
        return Position()
    position = read_position(checkpoint)
    console.line(f"{module.stage.name}: going on after step {position.step} of {module.num_steps}, from {checkpoint}")
    restore_student(checkpoint, module.student)
    module.begin_at(steps=position.step, tokens=position.tokens)
    (stage_folder / METRICS).unlink(missing_ok=True)
    if (checkpoint / METRICS).is_file():
        shutil.copyfile(checkpoint / METRICS, stage_folder / METRICS)
    return position


def _heldout_callback(
    batches: Iterable[torch.Tensor] | None, train: TrainConfig, stage_folder: Path, position: Position
) -> HeldoutCallback | None:
    if batches is None:
        return None
    return HeldoutCallback(batches, train.heldout_every_steps, stage_folder / "heldout.csv", position.heldout)


def _write_stage(student: RadladsForCausalLM, folder: Path, **facts: Any) -> None:
    """The finished model and, last, its manifest."""
    student.to("cpu")  # type: ignore[arg-type]
    student.requires_grad_(False).eval()
    save_model(student, folder)
    write_manifest(folder, **facts)


def training_samples(config: Config, vocab_size: int) -> tuple[TokenSamples | MixedSamples, int]:
    """The stage's samples, whole accumulation windows of them, and its number of optimiser steps."""
    train, context = config.train, config.model.ctx_len
    corpora = open_corpora(train)
    for reader, _ in corpora:
        check_vocabulary(reader, vocab_size, f"{reader.path_stem}.bin")
    num_tokens = sum(reader.num_tokens for reader, _ in corpora) - train.heldout_tail_tokens
    tokens_per_step = train.micro_bsz * train.accumulate_grad_batches * context
    num_steps = max(1, round((train.my_exit_tokens or num_tokens) / tokens_per_step))
    num_samples = num_steps * train.micro_bsz * train.accumulate_grad_batches
    prime = 0 if train.magic_prime == "auto" else train.magic_prime
    if len(corpora) == 1:
        reader = corpora[0][0]
        kept = TokenSpan(reader, 0, _tail_start(reader, train.heldout_tail_tokens))
        return TokenSamples(kept, context, num_samples=num_samples, magic_prime=prime), num_steps
    if prime:
        raise ValueError("train.magic_prime belongs to one corpus: set it to auto where train.data_file names several")
    return MixedSamples(corpora, context, num_samples=num_samples), num_steps


def _document_ends(config: Config, *models: RadladsForCausalLM | None) -> tuple[int, ...]:
    """The tokens that end a document, where the configuration asks for documents."""
    train = config.train
    if not (train.mask_labels_at_eos or train.reset_state_at_eos):
        return ()
    configs = [model.config for model in models if model is not None]
    return document_ends(train, configs, [reader for reader, _ in open_corpora(train)])


def open_corpora(train: TrainConfig) -> list[tuple[BinIdxReader, Fraction]]:
    """The corpora to train on, and their shares of the samples."""
    if not train.data_file:
        raise ValueError("train.data_file is not set: name the .bin/.idx pair to train on, without the extension")
    return [(BinIdxReader(path), share) for path, share in parse_mixture(train.data_file)]


def heldout_batches(config: Config, vocab_size: int) -> Iterable[torch.Tensor] | None:
    """Batches of held-out windows, or None if the configuration names no held-out tokens."""
    train, context = config.train, config.model.ctx_len
    if not train.validation_data_file and not train.heldout_tail_tokens:
        return None
    corpora = parse_mixture(train.validation_data_file or train.data_file)
    if len(corpora) > 1:
        raise ValueError("held-out tokens come from one corpus: name it as train.validation_data_file")
    reader = BinIdxReader(corpora[0][0])
    check_vocabulary(reader, vocab_size, f"{reader.path_stem}.bin")
    first = _tail_start(reader, train.heldout_tail_tokens) if train.heldout_tail_tokens else 0
    heldout = TokenSpan(reader, first, reader.num_tokens)
    windows = HeldoutWindows(heldout, context, max(train.heldout_tokens, context))
    return DataLoader(WatchedCorpora(windows, [reader]), batch_size=train.micro_bsz)


def _tail_start(reader: BinIdxReader, tail_tokens: int) -> int:
    """Where the held-out tokens at the end begin."""
    if tail_tokens >= reader.num_tokens:
        raise ValueError(
            f"train.heldout_tail_tokens {tail_tokens} takes all {reader.num_tokens} tokens of {reader.path_stem}.bin: "
            "hold out fewer"
        )
    return reader.num_tokens - tail_tokens


def _train(trainer: L.Trainer, module: StageModule, batches: DataLoader, config: Config) -> None:
    """Fit with both models where, in what type and in what mode the configuration asks for; then as they were."""
    train, device = config.train, trainer.strategy.root_device
    teacher, models = module.teacher, [module.student]
    # Documents are of so many lengths that graphs of theirs would never be used again
    compile_setting = "never" if train.reset_state_at_eos else train.compile
    checkpointing = checkpointing_of(train)
    module.student.set_activation_checkpointing("none" if module.stage.name == "align" else checkpointing)
    module.student.train()
    try:
        module.student.to(device, _parameter_dtype(trainer, train, module.student))  # type: ignore[arg-type]
        if teacher is not None:
            models.append(_working_teacher(teacher, train, device, _parameter_dtype(trainer, train, teacher)))
            module.learn_from(models[-1])
        for model in models:
            model.compile_blocks(compiles(compile_setting, device))
        # Later stages' steps are long enough for the host, and their gradients too large to be kept between steps
        is_align = module.stage.name == "align"
        compiled_on_gpu = device.type == "cuda" and compiles(compile_setting, device)
        # A user's own mixer may wait for the device, which a graph cannot record
        module.graphed = is_align and compiled_on_gpu and is_registered(module.student.config)
        _fit(trainer, module, batches)
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(config, device)) from error
    finally:
        module.forget_graph()
        for model in models:
            model.compile_blocks(False)
        module.student.set_activation_checkpointing("none")
        if teacher is not None:
            module.learn_from(teacher.to("cpu"))  # type: ignore[arg-type]


def _working_teacher(
    teacher: RadladsForCausalLM, train: TrainConfig, device: torch.device, dtype: torch.dtype
) -> RadladsForCausalLM:
    """The teacher on `device`, or the copy of it that train.teacher_precision asks for."""
    if train.teacher_precision == "fp8":
        return fp8_copy(teacher, device, dtype)
    return teacher.to(device, dtype)  # type: ignore[arg-type]


def _parameter_dtype(trainer: L.Trainer, train: TrainConfig, model: RadladsForCausalLM) -> torch.dtype:
    """bf16 under bf16-true, else fp32; in mixed precision a teacher stays what it is."""
    if train.precision == "bf16-true":
        return torch.bfloat16
    trains = any(parameter.requires_grad for parameter in model.parameters())
    return torch.float32 if trains or trainer.precision == "32-true" else model.dtype


def compiles(setting: str, device: torch.device) -> bool:
    """Whether train.compile means to compile on `device`; "auto" is on CUDA where Triton runs."""
    return setting == "always" or (setting == "auto" and device.type == "cuda" and has_triton(device))


def out_of_memory(config: Config, device: torch.device) -> str:
    """What to lower when a stage does not fit into the GPU's memory."""
    train, checkpointing = config.train, checkpointing_of(config.train)
    remedies = [f"train.micro_bsz (now {train.micro_bsz}, with train.accumulate_grad_batches to make up for it)"]
    remedies.append(f"model.ctx_len (now {config.model.ctx_len})")
    settings = [] if stage_of(train) == "align" or checkpointing == "full" else ["train.activation_checkpointing full"]
    if train.precision != "bf16-true":
        settings.append("train.precision bf16-true")
    size = torch.cuda.get_device_properties(device).total_memory / 1e9
    advice = f"lower {' or '.join(remedies)}" + (f", or set {' or '.join(settings)}" if settings else "")
    return f"the {stage_of(train)} stage does not fit into the GPU's {size:.0f} GB: {advice}"


def _fit(trainer: L.Trainer, module: StageModule, batches: DataLoader) -> None:
    """Train; a Ctrl-C, which Lightning turns into an exit of its own, comes out as the KeyboardInterrupt it was."""
    try:
        trainer.fit(module, batches)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    assert module.steps_done == module.num_steps
    with weights_to_keep(trainer.optimizers):
        for optimizer in trainer.optimizers:
            optimizer.param_groups.clear()  # or leaving the block would change the weights back


def build_trainer(train: TrainConfig, folder: Path, callbacks: list[L.Callback], *, first_step: int = 0) -> L.Trainer:
    """Lightning's Trainer for one pass over the stage's samples, metrics to metrics.csv and tensorboard/.

    first_step: steps that are done already; later ones that a killed run has written to tensorboard/ are hidden there.
    Raises ValueError if the GPU asked for is missing, or too old for bf16.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    accelerator = {"gpu": "cuda"}.get(train.accelerator, train.accelerator)
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.accelerator is 'gpu', but no CUDA GPU is here: set --train.accelerator cpu (or auto)")
    precision = resolve_precision(train.precision, accelerator)
    if precision.startswith("bf16") and accelerator != "cpu" and not gpu_multiplies_bf16():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ValueError(
            f"this GPU (compute capability {capability}) has no bf16 units, which train.precision {precision!r} needs: "
            "set --train.precision fp32, or take a GPU of compute capability 8.0 or newer"
        )
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=_LIGHTNING_PRECISION.get(precision, precision),
        max_epochs=1,
        callbacks=callbacks,
        logger=[
            MetricsCsv(folder / METRICS),
            TensorBoardLogger(
                folder, name="tensorboard", version="", purge_step=first_step + 1 if first_step else None
            ),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def resolve_precision(precision: str, accelerator: str) -> str:
    """ "auto" as "bf16" where the hardware multiplies bf16 natively (CUDA from 8.0, or a CPU with AMX), else "fp32"."""
    if precision != "auto":
        return precision
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    return "bf16" if (cpu_multiplies_bf16() if on_cpu else gpu_multiplies_bf16()) else "fp32"


def gpu_multiplies_bf16() -> bool:
    """Whether the CUDA GPU, if there is one, has matrix units for bf16 (Ampere and newer)."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _OLDEST_BF16_CAPABILITY


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16; without them bf16 is slower than fp32."""
    return bool(torch.backends.cpu.get_cpu_capability() != "DEFAULT" and torch.cpu._is_amx_tile_supported())


def recipe_hash(*parts: object) -> str:
    """A short fingerprint of everything that decides a stage's result."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
