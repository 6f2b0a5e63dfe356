"""Running one stage from a student in memory to a finished stage folder."""

import hashlib
import logging
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.manifest import write_manifest
from radlads.checkpoint.model_folder import save_model, take_part_in_saving
from radlads.checkpoint.safetensors_writer import SHARD_BYTES
from radlads.config.load import dump_config
from radlads.config.schema import Config, TrainConfig, check_available, checkpointing_of
from radlads.console import Console
from radlads.distill.fp8_teacher import fp8_copy
from radlads.distill.heldout import Heldout
from radlads.distill.logits import build_stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.callbacks import HeldoutCallback, Progress
from radlads.train.checkpointing import Checkpointing
from radlads.train.checkpoints.resume import describe_run, first_checkpoint
from radlads.train.checkpoints.snapshots import CHECKPOINTS, Position, read_position, remove_all, restore_student
from radlads.train.corpora.samples import (
    ends_of_documents,
    heldout_batches,
    open_corpora,
    open_heldout,
    sequences_per_step,
    training_samples,
)
from radlads.train.corpora.watched_corpora import WatchedCorpora
from radlads.train.cuda_graph import records_graph
from radlads.train.engines.rows import is_in_rows
from radlads.train.engines.sharding import settle
from radlads.train.engines.strategies import strategy_arguments
from radlads.train.engines.zero import ZeroStrategy, engine_dtype
from radlads.train.hardware import check_hardware, compiles, out_of_memory
from radlads.train.lightning_module import StageModule
from radlads.train.logging.loggers import build_loggers, carry, check_loggers
from radlads.train.processes.group import ALONE, Processes, check_processes
from radlads.train.spike_guard import SpikeGuard
from radlads.train.stopping import StopRequests

# run_stage casts the weights for bf16-true: Lightning's own would also make bf16 the default type of every tensor that
# a model makes on its way, RoPE frequencies among them
_LIGHTNING_PRECISION: dict[str, Any] = {
    "bf16": "bf16-mixed",
    "bf16-true": "32-true",
    "fp32": "32-true",
    "32": "32-true",
}


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
    processes: Processes = ALONE,
) -> StageResult:
    """Train `student` in place by the stage `config` describes and write the finished stage to `folder`.

    `parent` says what the student started from, `recipe` fingerprints all that decides the result; both go into the
    manifest. An unfinished run of the same stage is gone on with, exactly, at its newest checkpoint (train.resume).
    Under bf16-true both models are in bf16 from then on, and so is the folder. Of several `processes` all have to call
    this, with models that build_models made for them; the first writes, and DeepSpeed leaves the teacher of no further
    use. Raises ValueError if the folder exists, holds another unfinished run, or is in use, the data does not fit, the
    stage lacks its teacher, the loss is not finite, or the GPU's memory is too small; the folder then stays
    `NAME.partial`. Raises Stopped, a SystemExit, after a checkpoint if a signal asks for it.
    """
    train = config.train
    check_available(config)
    check_processes(train, processes)
    check_loggers(train)
    stage = build_stage(train, end_ids=ends_of_documents(config, student, teacher))
    if stage.needs_teacher and teacher is None:
        raise ValueError(f"the {stage.name} stage needs a teacher: set train.teacher.hf_path to its folder or hub name")
    samples, num_steps = training_samples(config, student.config.vocab_size, processes)
    heldout = heldout_batches(config, student.config.vocab_size)
    run = describe_run(config, student, teacher, open_corpora(train), processes, heldout=open_heldout(train))
    with StopRequests(alone=processes.size == 1) as stop:
        learns_from = teacher if stage.needs_teacher or heldout else None
        module = StageModule(stage, student, learns_from, train, num_steps, stop=stop, processes=processes)
        with ExitStack() as opened:
            partial = processes.from_first(lambda: opened.enter_context(unfinished_folder(folder, keep_earlier=True)))
            begin = processes.from_first(lambda: first_checkpoint(train.resume, partial, run, console))
            position = _begin(begin, module, partial, console)
            for model in (student, *([learns_from] if learns_from else [])):
                settle(model)
            if train.spike_factor:
                module.spike_guard = SpikeGuard(train.spike_factor, partial, console.line, position.spike_guard)
            if processes.is_first:
                (partial / "config.yaml").write_text(dump_config(config))
            processes.wait_for_all()
            measured = _heldout_callback(heldout, train, partial, position)
            checkpointing = Checkpointing(
                train, partial, run, stop, console, measured=measured, begin=begin, position=position
            )
            progress = Progress(console, num_steps * sequences_per_step(train, processes) * config.model.ctx_len)
            callbacks: list[L.Callback] = [each for each in (progress, measured, checkpointing) if each is not None]
            trainer = build_trainer(train, partial, callbacks, first_step=position.step, processes=processes)
            corpora = [reader for reader, _ in open_corpora(train)]
            watched = WatchedCorpora(samples, corpora, first=position.samples // processes.size)
            _train(trainer, module, DataLoader(watched, batch_size=train.micro_bsz), config)
            seconds = checkpointing.seconds()
            last = measured.history[-1][2] if measured else None
            facts = {"stage": stage.name, "parent": parent, "recipe": recipe, "tokens": module.tokens_done}
            facts |= {"sequences_per_step": sequences_per_step(train, processes), "seconds": seconds}
            facts |= {"heldout": vars(last) if last else None}
            _write_stage(student, partial, processes, **facts)
        processes.wait_for_all()
        # Only now: a run that is killed before its folder has the name still needs them
        if processes.is_first:
            _remove_checkpoints(folder, console)
        if stop.agreed is not None:
            console.line(f"{stop.agreed.name}: stopped, with the stage finished in {folder}")
            raise stop.stopped()
    return StageResult(folder, module.tokens_done, seconds, last, begin is not None)


def _remove_checkpoints(stage_folder: Path, console: Console) -> None:
    """Of a stage that is finished, which it stays whatever becomes of them."""
    try:
        remove_all(stage_folder)
    except (ValueError, OSError) as reason:
        console.line(f"{stage_folder / CHECKPOINTS} stays: {reason}")


def _begin(checkpoint: Path | None, module: StageModule, stage_folder: Path, console: Console) -> Position:
    """Bring weights, counts and logs to where the checkpoint's run stood, saying so; the rest follows later."""
    if checkpoint is None:
        return Position()
    position = read_position(checkpoint)
    console.line(f"{module.stage.name}: going on after step {position.step} of {module.num_steps}, from {checkpoint}")
    restore_student(checkpoint, module.student)
    module.begin_at(steps=position.step, tokens=position.tokens)
    if module.processes.is_first:
        carry(checkpoint, stage_folder)
    module.processes.wait_for_all()
    return position


def _heldout_callback(
    batches: Iterable[torch.Tensor] | None, train: TrainConfig, stage_folder: Path, position: Position
) -> HeldoutCallback | None:
    if batches is None:
        return None
    return HeldoutCallback(batches, train.heldout_every_steps, stage_folder / "heldout.csv", position.heldout)


def _write_stage(student: RadladsForCausalLM, folder: Path, processes: Processes, **facts: Any) -> None:
    """The finished model and, last, its manifest."""
    student.requires_grad_(False).eval()
    in_rows = is_in_rows(student)
    if processes.is_first:
        save_model(student, folder, shard_bytes=SHARD_BYTES if in_rows else None)
        write_manifest(folder, **facts)
    elif in_rows:
        take_part_in_saving(student)


def _train(trainer: L.Trainer, module: StageModule, batches: DataLoader, config: Config) -> None:
    """Fit with both models where, in what type and in what mode the configuration asks for; then where they were."""
    train, device = config.train, trainer.strategy.root_device
    teacher, models = module.teacher, [module.student]
    home, teachers_home = module.student.device, None if teacher is None else teacher.device
    spread = is_in_rows(module.student)  # and placed by those who spread it
    compiled = compiles(train, device)
    module.student.set_activation_checkpointing(checkpointing_of(train))
    module.student.train()
    try:
        if not spread:
            module.student.to(device, _parameter_dtype(trainer, train, module.student))  # type: ignore[arg-type]
        if teacher is not None:
            dtype = _parameter_dtype(trainer, train, teacher)
            models.append(_working_teacher(teacher, device, train, dtype))
            module.learn_from(models[-1])
        for model in models:
            model.compile_blocks(compiled)
        if device.type == "cuda" and not spread:
            wanted = records_graph(train, module.stage, module.student, compiled=compiled)
            module.graphed = all(module.processes.gather(wanted))  # for the same collectives, in the same order
        _fit(trainer, module, batches)
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(config, device, module.processes, graphed=module.graphed)) from error
    finally:
        module.forget_graph()
        for model in models:
            model.compile_blocks(False)
        module.student.set_activation_checkpointing("none")
        if teacher is not None:
            module.learn_from(teacher if spread else teacher.to(teachers_home))  # type: ignore[arg-type]
        if not spread:
            module.student.to(home)  # type: ignore[arg-type]


def _working_teacher(
    teacher: RadladsForCausalLM, device: torch.device, train: TrainConfig, dtype: torch.dtype
) -> RadladsForCausalLM:
    """The teacher on the device, or its copy in 8 bits if train.teacher_precision asks for one; as it is if spread."""
    if train.teacher_precision == "fp8":
        return fp8_copy(teacher, device, dtype)
    return teacher if is_in_rows(teacher) else teacher.to(device, dtype)  # type: ignore[arg-type]


def _parameter_dtype(trainer: L.Trainer, train: TrainConfig, model: RadladsForCausalLM) -> torch.dtype:
    """bf16 under bf16-true, else fp32; in mixed precision a teacher stays what it is, or is as an engine's student."""
    if train.precision == "bf16-true":
        return torch.bfloat16
    if isinstance(trainer.strategy, ZeroStrategy):
        return engine_dtype(trainer.precision)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    return torch.float32 if trains or trainer.precision == "32-true" else model.dtype


def _fit(trainer: L.Trainer, module: StageModule, batches: DataLoader) -> None:
    """Train; a Ctrl-C, which Lightning turns into an exit of its own, comes out as the KeyboardInterrupt it was."""
    try:
        trainer.fit(module, batches)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    assert module.steps_done == module.num_steps


def build_trainer(
    train: TrainConfig,
    folder: Path,
    callbacks: list[L.Callback],
    *,
    first_step: int = 0,
    processes: Processes = ALONE,
) -> L.Trainer:
    """Lightning's Trainer for one pass over the stage's samples; loggers as build_loggers says.

    first_step: steps that are done already. Raises ValueError as check_hardware does.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    accelerator, precision = check_hardware(train)
    trainer = L.Trainer(
        accelerator=accelerator,
        **strategy_arguments(train, processes),
        precision=_LIGHTNING_PRECISION.get(precision, precision),
        max_epochs=1,
        callbacks=callbacks,
        logger=build_loggers(train, folder, first_step=first_step),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    # Signals are StopRequests', agreed on in the step's own sum. Lightning's handler would broadcast at once, and its
    # loop wait for the GPU before every micro-batch to hear of that
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def recipe_hash(*parts: object) -> str:
    """A short fingerprint of everything that decides a stage's result."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
