"""Running one stage from a student in memory to a finished stage folder."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.manifest import write_manifest
from radlads.config.load import dump_config
from radlads.config.schema import Config, TrainConfig, check_available, checkpointing_of
from radlads.console import Console
from radlads.data.chat_rows import ConversationRows
from radlads.distill.heldout import Heldout
from radlads.distill.logits import build_stage
from radlads.distill.stage import Stage
from radlads.files import write_text
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.callbacks import HeldoutCallback, Progress
from radlads.train.checkpointing import Checkpointing
from radlads.train.checkpoints.resume import describe_run, first_checkpoint
from radlads.train.checkpoints.snapshots import (
    CHECKPOINTS,
    Position,
    read_position,
    remove_all,
    restore_student,
    written_rows,
)
from radlads.train.corpora.samples import (
    Samples,
    ends_of_documents,
    heldout_batches,
    open_corpora,
    open_heldout,
    sequences_per_step,
    training_samples,
)
from radlads.train.corpora.watched_corpora import WatchedCorpora
from radlads.train.cuda_graph import records_graph
from radlads.train.engines.table import engine_for
from radlads.train.hardware import compiles, out_of_memory
from radlads.train.lightning_module import StageModule
from radlads.train.logging.loggers import carry, check_loggers
from radlads.train.on_policy import OnPolicy
from radlads.train.processes.group import ALONE, Processes, check_processes
from radlads.train.spike_guard import SpikeGuard
from radlads.train.stopping import StopRequests
from radlads.train.trainer import build_trainer


@dataclass(frozen=True)
class StageResult:
    """What a stage did. seconds: wall time of the fit, held-out measurements included, and of the runs that it went on
    with. resumed: whether it began at a checkpoint."""

    folder: Path
    tokens: int
    seconds: float
    heldout: Heldout | None
    resumed: bool = False


@dataclass(frozen=True)
class _Work:
    """What a stage trains on, by what, and what tells it from other runs (`identity`)."""

    config: Config
    stage: Stage
    samples: Samples
    num_steps: int
    heldout: Iterable[torch.Tensor] | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """A stage in its unfinished folder. begin: the checkpoint that it goes on from, and `position` what it says."""

    work: _Work
    module: StageModule
    folder: Path
    console: Console
    begin: Path | None
    position: Position


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
    notes: Mapping[str, str] = MappingProxyType({}),
) -> StageResult:
    """Train `student` in place by the stage `config` describes and write the finished stage to `folder`.

    `parent` says what the student started from, `recipe` fingerprints all that decides the result; both go into the
    manifest. `notes` are texts to keep in the folder, by file name. An unfinished run of the same stage is gone on
    with, exactly, at its newest checkpoint (checkpoints/resume.py). Under bf16-true both models are in bf16 from then
    on, and so is the folder. Of several `processes` all have to call this, with models that build_models made for them;
    the first writes, and under some engines the teacher is of no further use. Raises ValueError if the folder exists,
    holds another unfinished run, or is in use, the data does not fit, the stage lacks its teacher, the loss is not
    finite, or the GPU's memory is too small; the folder then stays `NAME.partial`. Raises Stopped, a SystemExit, after
    a checkpoint if a signal asks for it.
    """
    work = _prepared(config, student, teacher, processes)
    with StopRequests(alone=processes.size == 1) as stop:
        learns_from = teacher if work.stage.needs_teacher or work.heldout else None
        engine = engine_for(config.train, processes)
        module = StageModule(work.stage, student, learns_from, config.train, work.num_steps, engine, stop)
        _begin_writing(work, module, console)
        with ExitStack() as opened:
            partial = processes.from_first(lambda: opened.enter_context(unfinished_folder(folder, keep_earlier=True)))
            begin = processes.from_first(lambda: first_checkpoint(config.train.resume, partial, work.identity, console))
            if processes.is_first:
                for name, text in notes.items():
                    write_text(partial / name, text)
            run = _Run(work, module, partial, console, begin, _begin(begin, module, partial, console))
            seconds, heldout = _fit(run)
            facts = {"stage": work.stage.name, "parent": parent, "recipe": recipe, "tokens": module.tokens_done}
            facts |= {"sequences_per_step": sequences_per_step(config.train, processes), "seconds": seconds}
            _write_stage(run, **facts, heldout=vars(heldout) if heldout else None)
        processes.wait_for_all()
        # Only now: a run that is killed before its folder has the name still needs them
        if processes.is_first:
            _remove_checkpoints(folder, console)
        if stop.agreed is not None:
            console.line(f"{stop.agreed.name}: stopped, with the stage finished in {folder}")
            raise stop.stopped()
    return StageResult(folder, module.tokens_done, seconds, heldout, begin is not None)


def _prepared(
    config: Config, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, processes: Processes
) -> _Work:
    """What can be known before anything is written. Raises ValueError as run_stage."""
    train = config.train
    check_available(config)
    check_processes(train, processes)
    check_loggers(train)
    stage = build_stage(train, end_ids=ends_of_documents(config, student, teacher))
    if stage.needs_teacher and teacher is None:
        raise ValueError(f"the {stage.name} stage needs a teacher: set train.teacher.hf_path to its folder or hub name")
    samples, num_steps = training_samples(config, student.config.vocab_size, processes)
    heldout = heldout_batches(config, student.config.vocab_size)
    identity = describe_run(config, student, teacher, open_corpora(train), processes, heldout=open_heldout(train))
    return _Work(config, stage, samples, num_steps, heldout, identity)


def _begin(checkpoint: Path | None, module: StageModule, stage_folder: Path, console: Console) -> Position:
    """Bring weights, counts and logs to where the checkpoint's run stood, saying so; the rest follows later."""
    if checkpoint is None:
        return Position()
    position = read_position(checkpoint)
    console.line(f"{module.stage.name}: going on after step {position.step} of {module.num_steps}, from {checkpoint}")
    restore_student(checkpoint, module.student)
    if module.on_policy is not None and (written := written_rows(checkpoint)):
        module.on_policy.restore(written)
    module.begin_at(steps=position.step, tokens=position.tokens)
    if module.processes.is_first:
        carry(checkpoint, stage_folder)
    module.processes.wait_for_all()
    return position


def _begin_writing(work: _Work, module: StageModule, console: Console) -> None:
    """Say what of conversations is not read, and have the student write its rows, if it is to write any."""
    if not isinstance(work.samples, ConversationRows):
        return
    for note in work.samples.notes:
        console.line(note)
    if work.samples.on_policy_share:
        train, processes = work.config.train, module.processes
        sequences = sequences_per_step(train, processes)
        module.on_policy = OnPolicy(
            train, work.samples, num_steps=work.num_steps, sequences=sequences, processes=processes
        )


def _heldout_callback(
    batches: Iterable[torch.Tensor] | None, train: TrainConfig, stage_folder: Path, position: Position
) -> HeldoutCallback | None:
    if batches is None:
        return None
    return HeldoutCallback(batches, train.heldout_every_steps, stage_folder / "heldout.csv", position.heldout)


def _fit(run: _Run) -> tuple[float, Heldout | None]:
    """Train the stage from where it begins to its end: its seconds, and the last held-out measurement."""
    work, module, processes = run.work, run.module, run.module.processes
    config, train = work.config, work.config.train
    for model in (module.student, *([module.teacher] if module.teacher else [])):
        module.engine.lazy_init(model)
    if train.spike_factor:
        module.reader.guard = SpikeGuard(train.spike_factor, run.folder, run.console.line, run.position.spike_guard)
    if processes.is_first:
        (run.folder / "config.yaml").write_text(dump_config(config))
    processes.wait_for_all()
    measured = _heldout_callback(work.heldout, train, run.folder, run.position)
    checkpointing = Checkpointing(
        train,
        run.folder,
        work.identity,
        module.stop,
        run.console,
        measured=measured,
        begin=run.begin,
        position=run.position,
    )
    progress = Progress(run.console, work.num_steps * sequences_per_step(train, processes) * config.model.ctx_len)
    callbacks: list[L.Callback] = [each for each in (progress, measured, checkpointing) if each is not None]
    trainer = build_trainer(train, run.folder, callbacks, module.engine, first_step=run.position.step)
    corpora = [reader for reader, _ in open_corpora(train)]
    watched = WatchedCorpora(work.samples, corpora, first=run.position.samples // processes.size)
    _train(trainer, module, DataLoader(watched, batch_size=train.micro_bsz), config)
    return checkpointing.seconds(), measured.history[-1][2] if measured else None


def _train(trainer: L.Trainer, module: StageModule, batches: DataLoader, config: Config) -> None:
    """Fit with both models where, in what type and in what mode the configuration asks for; then where they were."""
    device, student, teacher, passes = trainer.strategy.root_device, module.student, module.teacher, module.passes
    student.set_activation_checkpointing(checkpointing_of(config.train))
    student.train()
    try:
        with module.engine.placed(student, teacher, device, str(trainer.precision)) as working:
            passes.teacher = working
            with _compiled(config.train, module, device):
                _run_trainer(trainer, module, batches)
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(config, module.engine, device, graphed=passes.graphed)) from error
    finally:
        student.set_activation_checkpointing("none")
        passes.teacher = teacher


@contextmanager
def _compiled(train: TrainConfig, module: StageModule, device: torch.device) -> Iterator[None]:
    """While open, blocks are compiled and passes recorded, if and where train.compile and train.cuda_graphs say so."""
    models = [module.student, *([] if module.teacher is None else [module.teacher])]
    compiled = compiles(train, device)
    try:
        for model in models:
            model.compile_blocks(compiled)
        if device.type == "cuda" and module.engine.records_graphs:
            wanted = records_graph(train, module.stage, module.student, compiled=compiled)
            # For the same collectives, in the same order
            module.passes.graphed = all(module.processes.gather(wanted))
        yield
    finally:
        module.passes.forget_graph()
        for model in models:
            model.compile_blocks(False)


def _run_trainer(trainer: L.Trainer, module: StageModule, batches: DataLoader) -> None:
    """Train; a Ctrl-C, which Lightning turns into an exit of its own, comes out as the KeyboardInterrupt it was."""
    try:
        trainer.fit(module, batches)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    assert module.steps_done == module.num_steps


def _write_stage(run: _Run, **facts: Any) -> None:
    """The finished model and, last, its manifest."""
    student, engine = run.module.student, run.module.engine
    student.requires_grad_(False).eval()
    engine.save(student, run.folder)
    if engine.processes.is_first:
        write_manifest(run.folder, **facts)


def _remove_checkpoints(stage_folder: Path, console: Console) -> None:
    """Of a stage that is finished, which it stays whatever becomes of them."""
    try:
        remove_all(stage_folder)
    except (ValueError, OSError) as reason:
        console.line(f"{stage_folder / CHECKPOINTS} stays: {reason}")


def recipe_hash(*parts: object) -> str:
    """A short fingerprint of everything that decides a stage's result."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
