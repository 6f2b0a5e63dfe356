"""Softmax layers that a student gets after stage 1: selected by auto:K, or named for a student that has none yet.

Owns when that happens in `radlads train` and `radlads demo`, on which text, and how a run that goes on finds the layers
again. Leaves the search to selection/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from radlads.checkpoint.atomic import partial_name
from radlads.checkpoint.manifest import MANIFEST
from radlads.config.layer_lists import layers_of, num_selected, selectable_layers, with_softmax_layers
from radlads.config.schema import Config, ModelConfig, stage_of
from radlads.console import Console
from radlads.convert.blueprint import Blueprint
from radlads.convert.hf_source import TeacherSource
from radlads.convert.kept_layers import kept_blueprint, kept_student, share_embedding
from radlads.convert.student import layer_mixers, teacher_blueprint
from radlads.data.loader import HeldoutWindows
from radlads.files import read_json, write_text
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import SOFTMAX
from radlads.selection.probes import TextProbe
from radlads.selection.record import model_facts, read_layers, record_of, text_of
from radlads.selection.search import listed, search
from radlads.train.checkpoints.resume import SELECTION, check_named
from radlads.train.checkpoints.snapshots import checkpoints_in
from radlads.train.corpora.samples import selection_windows
from radlads.train.hardware import check_hardware, only_device
from radlads.train.processes.group import Processes


@dataclass(frozen=True)
class Kept:
    """A stage whose student has its softmax layers: the configuration names them. notes: to keep in its folder."""

    config: Config
    student: Blueprint
    notes: Mapping[str, str]


def named_where_kept(config: Config, student: RadladsConfig) -> Config:
    """The configuration, in which auto:K names the layers of a student that keeps its K layers already.

    Raises ValueError for a student that keeps another number of them.
    """
    wanted, found = num_selected(config.model), student.time_mixers
    if not wanted:
        return config
    base = layer_mixers(with_softmax_layers(config.model, ()), len(found))
    kept = [layer for layer, name in enumerate(found) if name != base[layer]]
    if not kept or any(found[layer] != SOFTMAX for layer in kept):
        return config
    if len(kept) != wanted:
        raise ValueError(
            f"{config.train.load_model} keeps softmax in layers {listed(kept)}, but model.softmax_layers is "
            f"auto:{wanted}: set it to {listed(kept)}, or to auto:{len(kept)}"
        )
    return replace(config, model=with_softmax_layers(config.model, kept))


def is_without_layers(config: Config, student: RadladsConfig) -> bool:
    """Whether the stage comes after align, and its student has yet to get softmax layers that it is to have.

    Raises ValueError as layer_lists.mixers_by_layer.
    """
    model, found = config.model, student.time_mixers
    layer_mixers(model, len(found))  # raises for a K that leaves no layer
    if stage_of(config.train) == "align":
        return False
    if num_selected(model):
        return found == layer_mixers(with_softmax_layers(model, ()), len(found))
    return bool(_named_anew(model, student))


def before_layers(config: Config, student: RadladsConfig) -> Config:
    """The configuration of a student that is_without_layers, as it is before it gets them."""
    model, layers = config.model, []
    if not num_selected(model):
        named = layers_of(model.softmax_layers, student.num_hidden_layers, "model.softmax_layers")
        layers = sorted({*named} - {*_named_anew(model, student)})
    return replace(config, model=with_softmax_layers(model, layers))


def _named_anew(model: ModelConfig, student: RadladsConfig) -> list[int]:
    """The layers that softmax_layers names and that the student runs as it would without; none if the student differs
    in any other layer too."""
    found = student.time_mixers
    named, without = (layer_mixers(each, len(found)) for each in (model, with_softmax_layers(model, ())))
    layers = [layer for layer, name in enumerate(named) if name != found[layer]]
    return layers if all(named[layer] == SOFTMAX and found[layer] == without[layer] for layer in layers) else []


def with_layers(
    config: Config,
    student: Blueprint,
    source: TeacherSource | None,
    folder: Path,
    console: Console,
    processes: Processes,
) -> Kept:
    """The stage of a student that is_without_layers, with the layers that are named, or else selected now.

    A run that goes on at a checkpoint in `folder`'s unfinished one takes the layers that it began with. All processes
    have to call this. Raises ValueError for the extend and instruct stages, for layers that leave no recurrent one, if
    the stage has no teacher or another than align had, and where a GPU's memory is too small.
    """
    stage, start = stage_of(config.train), config.train.load_model
    if stage in ("extend", "instruct"):
        raise ValueError(
            f"model.softmax_layers is {config.model.softmax_layers}, but {start} has other softmax layers or none, and "
            f"the {stage} stage adds none: give the layers of the model itself, or add them in a distill stage"
        )
    if source is None:
        raise ValueError(
            f"the {stage} stage names no teacher whose attention the layers of {start} could get: set "
            "train.teacher.hf_path, or leave model.softmax_layers out"
        )
    made_by = _stage_that_made(Path(start))
    assert student.stored is not None
    if made_by == "align" and not share_embedding(student.stored, source.weights):
        raise ValueError(
            f"{source.folder} is not the teacher that {start} was aligned with, as its embedding is another: name that "
            "one in train.teacher.hf_path"
        )
    notes: dict[str, str] = {}
    if wanted := num_selected(config.model):
        found = processes.from_first(lambda: _begun_with(config, wanted, folder))
        if found is None:
            found = _selected(config, wanted, student, source, console, processes)
        else:
            console.line(f"{stage}: softmax layers {listed(found[0])}, selected when this run began")
        layers, notes[SELECTION] = found
        config = replace(config, model=with_softmax_layers(config.model, layers))
    else:
        layers = _named_anew(config.model, student.config)
        if set(layers) >= set(student.config.recurrent_layers):
            raise ValueError(
                f"model.softmax_layers is {config.model.softmax_layers}, which leaves no recurrent layer: name fewer"
            )
        console.line(f"{stage}: layers {listed(layers)} of {start} get the teacher's attention, as named")
    if made_by not in ("", "align"):
        console.line(
            f"{stage}: {start} is from the {made_by} stage, so its other layers have learnt without softmax there"
        )
    return Kept(config, kept_blueprint(student, source.weights, layers, Path(start)), notes)


def _stage_that_made(folder: Path) -> str:
    """The stage of a stage's folder; empty for another folder or file."""
    manifest = folder / MANIFEST
    return str(read_json(manifest).get("stage", "")) if manifest.is_file() else ""


def _begun_with(config: Config, wanted: int, folder: Path) -> tuple[list[int], str] | None:
    """The layers that the run to go on with has selected, and the text of their file; None if there is no such run.

    That it is a run of the same models and text is checked with its checkpoint, whose student has these layers.
    """
    resume, partial = config.train.resume, partial_name(folder)
    homes = [partial] if resume != "never" and checkpoints_in(partial) else []
    if resume not in ("auto", "never"):
        check_named(Path(resume))
        homes.append(Path(resume).parent.parent)
    for path in (home / SELECTION for home in homes):
        if (layers := read_layers(path, {"keep": wanted})) is not None:
            return layers, path.read_text(encoding="utf-8")
    return None


def _selected(
    config: Config,
    wanted: int,
    student: Blueprint,
    source: TeacherSource,
    console: Console,
    processes: Processes,
) -> tuple[list[int], str]:
    """The layers that are selected, and the text of their file. The models are built for this alone."""
    device = processes.device or only_device(config.train)
    in_bf16 = device.type == "cuda" and check_hardware(config.train)[1].startswith("bf16")
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    windows, text = selection_windows(config, student.config.vocab_size)
    try:
        built, _ = student.build(dtype=dtype, device=device)
        teacher, _ = teacher_blueprint(source).build(dtype=dtype, device=device)
        found = _search(config, wanted, built.eval(), teacher.eval(), windows, text, console, processes)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory is too small to select layers, for which student and teacher are whole on each GPU: run "
            "radlads select on a larger one, and name the layers in model.softmax_layers"
        ) from error
    del built, teacher
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _search(
    config: Config,
    wanted: int,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    windows: HeldoutWindows,
    text: str,
    console: Console,
    processes: Processes,
) -> tuple[list[int], str]:
    probe = TextProbe([windows[i] for i in range(len(windows))], "kl")
    console.line(f"selecting {wanted} softmax layers by KL on {probe.num_tokens:,} tokens, {text}")
    recurrent = set(student.config.recurrent_layers)
    selection = search(
        student,
        teacher,
        probe,
        keep=wanted,
        candidates=[
            layer for layer in selectable_layers(config.model, len(student.config.time_mixers)) if layer in recurrent
        ],
        console=console,
        processes=processes,
    )
    console.line(f"softmax layers {listed(selection.layers)}, found in {selection.seconds:.0f} s")
    facts = {"text": text, "num_tokens": probe.num_tokens, "context_tokens": probe.context_tokens}
    return list(selection.layers), text_of(record_of(selection, facts | model_facts(student, teacher)))


def select_in_conversion(
    configs: dict[str, Config],
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    out: Path,
    console: Console,
) -> tuple[dict[str, Config], RadladsForCausalLM]:
    """The stages of a conversion whose student is aligned, and that student, with the softmax layers that auto:K asks
    for. OUT/layers.json is written, or read if it is of the same two models."""
    wanted, path = num_selected(configs["distill"].model), out / SELECTION
    if not wanted:
        return configs, student
    same = model_facts(student, teacher)
    layers = read_layers(path, {"keep": wanted, "student": same["student"], "teacher": same["teacher"]})
    if layers is None:
        windows, text = selection_windows(configs["distill"], student.config.vocab_size)
        layers, content = _search(configs["distill"], wanted, student, teacher, windows, text, console, Processes())
        write_text(path, content)
    else:
        console.line(f"softmax layers {listed(layers)}, selected earlier ({read_json(path)['text']})")
    configs = {
        stage: config if stage == "align" else replace(config, model=with_softmax_layers(config.model, layers))
        for stage, config in configs.items()
    }
    return configs, kept_student(student, teacher, layers)
