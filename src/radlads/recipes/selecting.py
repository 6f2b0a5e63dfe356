"""`radlads select`: the layers of a run's student that are worth keeping as softmax, found and written down."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from radlads.checkpoint.manifest import MANIFEST, joint_hash
from radlads.checkpoint.tokenizer_files import choose_tokenizer, num_ids
from radlads.checkpoint.weights import ModelWeights
from radlads.checksums import read_checksums
from radlads.config.schema import TrainConfig
from radlads.console import Console
from radlads.convert.hf_source import TeacherSource, open_teacher, open_tokenizer
from radlads.convert.kept_layers import share_embedding
from radlads.convert.student import build_teacher
from radlads.data.binidx import corpus_files, corpus_stem
from radlads.evaluation.models import model_config, open_model
from radlads.evaluation.perplexity import spread_windows
from radlads.evaluation.retrieval import PromptWriter
from radlads.evaluation.text_corpus import HELDOUT_SOURCES, is_corpus, text_corpus
from radlads.files import read_json, write_text
from radlads.inference.generate import choose_device
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes.export_source import teacher_named_in
from radlads.recipes.teacher_record import RECORD, teacher_checksums
from radlads.report.run_folder import SELECTION, Stage, read_run
from radlads.report.selection import selection_charts
from radlads.selection.command import Select
from radlads.selection.probes import NeedleProbe, Probe, TextProbe
from radlads.selection.record import model_facts, record_of, table_lines, text_of
from radlads.selection.search import Selection, listed, search
from radlads.train.processes.group import ALONE, Processes
from radlads.train.processes.joining import joined

_PLOT = ".png"
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEED = 0


@contextmanager
def sharing(request: Select) -> Iterator[Processes]:
    """The processes that share the work, started or joined as `radlads train` does. Raises ValueError if there are
    fewer GPUs."""
    device, _ = choose_device(request.device)
    if device.type == "cuda" and request.devices > torch.cuda.device_count():
        raise ValueError(f"--devices is {request.devices}, but here are {torch.cuda.device_count()} GPUs: give fewer")
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    with joined(TrainConfig(accelerator=accelerator, devices=request.devices)) as processes:  # type: ignore[arg-type]
        yield processes


def select_layers(request: Select, console: Console, processes: Processes = ALONE) -> Iterator[str]:
    """Search, write layers.json and a plot beside it, and yield the lines of a table; all processes have to.

    Raises ValueError before the search for a student, teacher, text or file that does not go with the request.
    """
    folder, stage = _student_folder(request.run)
    config = model_config(folder)
    out = request.out or request.run / SELECTION
    _check_student(request, config, folder)
    processes.from_first(lambda: _check_out(out))
    source = _teacher(request, folder)
    _check_teacher(request, config, source, folder)
    _check_recorded(source, folder)
    console.line(f"student: {folder}, {_origin(stage)}")
    console.line(f"teacher: {source.folder}")
    for note in source.notes:
        console.line(note)
    device, dtype = choose_device(request.device)
    device = processes.device or device
    with ExitStack() as opened:
        opened.enter_context(_enough_memory(request))
        probe, facts = _probe(request, config, source, folder, stage, opened)
        student = open_model(folder, dtype).to(device)  # type: ignore[arg-type]
        teacher = build_teacher(source, dtype=dtype).to(device)  # type: ignore[arg-type]
        if stage is not None and stage.name == "align":
            _check_embedding(student, teacher, source, folder)
        console.line(f"choosing {request.keep} of {len(config.recurrent_layers)} layers on {facts['text']}")
        selection = search(
            student,
            teacher,
            probe,
            keep=request.keep,
            candidates=config.recurrent_layers,
            console=console,
            processes=processes,
        )
    if processes.is_first:
        folders = {"student_folder": str(folder), "student_stage": _origin(stage), "teacher_folder": str(source.folder)}
        yield from _written(selection, facts | folders | model_facts(student, teacher), config, out)


@contextmanager
def _enough_memory(request: Select) -> Iterator[None]:
    """Say what takes less memory where a GPU's is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        option = "--needle-tokens" if request.by == "needle" else "--ctx-len"
        raise ValueError(
            "the GPU's memory is too small for student, teacher and what is kept of a batch: give a shorter "
            f"{option}, or --device cpu"
        ) from error


def _written(selection: Selection, facts: dict[str, Any], config: RadladsConfig, out: Path) -> Iterator[str]:
    yield from table_lines(selection)  # before anything can fail to be written
    record = record_of(selection, facts)
    write_text(out, text_of(record))
    (chart,) = selection_charts(record)
    plot = replace(chart, name=out.stem).save_png(out.parent)
    yield ""
    if selection.by == "needle" and not any(measured.values["needle"] for measured in selection.curve):
        yield "no needle was found, so the loss of the answers alone decided: give a shorter --needle-tokens"
    depth = config.num_hidden_layers
    before = [layer for layer in range(depth) if layer not in config.recurrent_layers]
    passes = selection.block_runs / depth / facts["num_batches"]
    yield f"wrote {out} and {plot} ({selection.seconds:.0f} s, {passes:.1f} passes of the student here)"
    yield f"--model.softmax_layers {listed(sorted((*before, *selection.layers)))}"


@dataclass(frozen=True)
class _Text:
    """A text to read: None = held-out sources of the running Python."""

    path: Path | None

    @property
    def name(self) -> str:
        return HELDOUT_SOURCES if self.path is None else str(self.path)


def _probe(
    request: Select,
    config: RadladsConfig,
    source: TeacherSource,
    folder: Path,
    stage: Stage | None,
    opened: ExitStack,
) -> tuple[Probe, dict[str, Any]]:
    """What is measured, and what is to be said of it."""
    text, tokenizer, home = _text(request, stage), None, source.folder
    vocab_size = min(config.vocab_size, source.config.vocab_size)
    if request.by == "needle" or text.path is None or not is_corpus(text.path):
        home = choose_tokenizer(request.tokenizer, folder, source.folder)
        tokenizer = open_tokenizer(home, vocab_size)._tokenizer
    corpus = opened.enter_context(text_corpus(text.path, tokenizer, home, vocab_size))
    if request.by == "needle":
        assert tokenizer is not None
        writer, num = PromptWriter("needle", tokenizer, corpus.tokens), request.num_prompts
        try:
            prompts = [writer.write(request.needle_tokens, _DEPTHS[i % 5], seed=_SEED + i // 5) for i in range(num)]
        except ValueError as error:
            raise ValueError(str(error).replace("use longer --lengths", "give a longer --needle-tokens")) from error
        needles = NeedleProbe(prompts, num_ids(tokenizer))
        what = f"{num} prompts of {request.needle_tokens:,} tokens, facts within {text.name}"
        return needles, {"text": what, "num_prompts": num, "needle_tokens": request.needle_tokens} | _size(needles)
    if corpus.num_tokens <= request.context_tokens:
        raise ValueError(
            f"{text.name} holds {corpus.num_tokens:,} tokens, less than one window of {request.context_tokens + 1:,}: "
            "give more text, or a shorter --ctx-len"
        )
    spread = spread_windows(corpus, request.context_tokens, request.num_tokens)
    windows = [spread[i] for i in range(len(spread))]
    texts = TextProbe(windows, request.by)
    what = f"{texts.num_tokens:,} tokens of {text.name}, windows of {request.context_tokens:,}"
    facts = {"text": what, "num_tokens": texts.num_tokens, "num_recalled": texts.num_recalled}
    return texts, facts | {"context_tokens": request.context_tokens} | _size(texts)


def _size(probe: Probe) -> dict[str, int]:
    return {"num_batches": len(probe)}


def _text(request: Select, stage: Stage | None) -> _Text:
    """The text that is named, else the run's held-out one if it is still there."""
    if request.text is not None:
        return _Text(request.text)
    heldout = "" if stage is None else str(stage.config.get("train", {}).get("validation_data_file") or "")
    if heldout and all(path.is_file() for path in corpus_files(corpus_stem(Path(heldout)))):
        return _Text(Path(heldout))
    return _Text(None)


def _student_folder(run: Path) -> tuple[Path, Stage | None]:
    """The student's folder, and the stage that made it if that is known: of several stages the last that aligns, else
    the last."""
    if (run / "config.json").is_file() and not (run / MANIFEST).is_file():
        return run, None
    stages = read_run(run).stages
    aligned = [stage for stage in stages if stage.name == "align"]
    stage = (aligned or stages)[-1]
    return stage.folder, stage


def _origin(stage: Stage | None) -> str:
    """Where a student comes from, in words."""
    if stage is None:
        return "a model's folder that names no stage"
    return f"after {stage.name}" + ("" if stage.name == "align" else ", whose other layers have learnt without softmax")


def _check_student(request: Select, config: RadladsConfig, folder: Path) -> None:
    there = len(config.recurrent_layers)
    if not there:
        raise ValueError(f"every layer of {folder} is softmax already: name a student's folder")
    if request.keep >= there:
        raise ValueError(
            f"--keep is {request.keep}, but {folder} has {there} layers that are not softmax already, and one of them "
            "must stay so: give fewer"
        )


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder: make it first, or choose another --out")
    if out.suffix == _PLOT:
        raise ValueError(f"{out} is the name of the plot, which is written beside the file: give --out another ending")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give --out a file's name")
    if out.exists():
        manifest = out.parent / MANIFEST
        if manifest.is_file() and out.name in read_json(manifest).get("sha256", {}):
            raise ValueError(f"{out} belongs to the stage, which selected its layers by it: choose another --out")
        raise ValueError(f"{out} exists already: remove it, or choose another --out")


def _teacher(request: Select, folder: Path) -> TeacherSource:
    named = request.teacher or (teacher_named_in(folder) if (folder / MANIFEST).is_file() else None)
    if named is None:
        raise ValueError(f"{folder} does not say who its teacher was: name its folder with --teacher")
    try:
        return open_teacher(named)
    except ValueError as error:
        if request.teacher is not None:
            raise
        raise ValueError(f"the run's teacher is not to be had ({error}): name its folder with --teacher") from error


def _check_teacher(request: Select, config: RadladsConfig, source: TeacherSource, folder: Path) -> None:
    """Raise ValueError for another model's teacher, and for a text that is longer than it knows."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if getattr(source.config, name) != getattr(config, name):
            raise ValueError(
                f"the {name} of {source.folder} is {getattr(source.config, name)}, and {getattr(config, name)} in "
                f"{folder}: name the student's own teacher with --teacher"
            )
    known = source.config.max_position_embeddings
    option, tokens = ("--ctx-len", request.context_tokens)
    if request.by == "needle":
        option, tokens = "--needle-tokens", request.needle_tokens
    if tokens > known:
        raise ValueError(f"{option} is {tokens}, but the teacher knows {known} positions: give fewer")


def _check_recorded(source: TeacherSource, folder: Path) -> None:
    """Raise ValueError if the conversion that a student is of has recorded the hashes of another teacher."""
    for record in (folder.parent / RECORD, folder / RECORD):
        if not record.is_file() or not source.folder.is_dir():
            continue
        _, hashes, _ = read_checksums(record)
        if joint_hash(hashes) != joint_hash(teacher_checksums(source.folder)["sha256"]):
            raise ValueError(f"{source.folder} is not the teacher that {record} describes: give that one as --teacher")


def _check_embedding(
    student: RadladsForCausalLM, teacher: RadladsForCausalLM, source: TeacherSource, folder: Path
) -> None:
    """Raise ValueError if the embedding, which aligning leaves as it is, is not the teacher's."""
    if not share_embedding(ModelWeights(student), ModelWeights(teacher)):
        raise ValueError(
            f"{source.folder} is not the teacher that {folder} was aligned with, as its embedding is another: name "
            "that one with --teacher"
        )
