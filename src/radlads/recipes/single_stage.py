"""One stage from a configuration: what `radlads train` does."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from radlads.checkpoint.atomic import check_new
from radlads.checkpoint.manifest import weights_hash
from radlads.checkpoint.model_folder import read_config
from radlads.checkpoint.tokenizer_files import locate_tokenizer
from radlads.checkpoint.weight_files import is_weights_file, open_weights, starting_point
from radlads.checkpoint.weights import StoredWeights
from radlads.checksums import sha256
from radlads.config.layer_lists import mixer_names
from radlads.config.schema import SIZE_KEYS, SOFTMAX_MIXER, Config, ModelConfig, check_available, stage_of
from radlads.config.sizes import check_sizes
from radlads.console import Console
from radlads.convert.bare_weights import is_teachers, shape_of, student_from_teacher, student_of
from radlads.convert.blueprint import Blueprint, stored_blueprint
from radlads.convert.hf_source import (
    SUPPORTED_ARCHITECTURES,
    TeacherSource,
    open_teacher,
    teacher_config,
    teacher_source,
)
from radlads.convert.student import layer_mixers, student_blueprint, teacher_blueprint
from radlads.model.configuration import RadladsConfig
from radlads.model.mixer_settings import settings_by_mixer, settings_from
from radlads.model.registry import SOFTMAX, mixer_class, name_mixers
from radlads.recipes.auto_layers import before_layers, is_without_layers, named_where_kept, with_layers
from radlads.selection.search import listed
from radlads.train.corpora.samples import open_corpora
from radlads.train.fit import StageResult, run_stage
from radlads.train.hardware import check_hardware
from radlads.train.logging.loggers import check_loggers
from radlads.train.placement import build_models
from radlads.train.processes.group import ALONE, Processes


def train_stage(config: Config, console: Console, processes: Processes = ALONE) -> StageResult:
    """Run the stage a configuration describes and write its folder; of several processes all have to.

    The student comes from train.load_model; without one, the align stage sets it up from the teacher. An align stage
    that names no teacher learns from what its student is set up from. Raises ValueError if neither is possible, and as
    run_stage does.
    """
    config = _with_teacher(config)
    train = config.train
    # What can be known cheaply is said before the models are read
    check_available(config)
    check_loggers(train)
    if train.data_file:
        open_corpora(train)
    teacher_path = train.teacher.path or train.teacher.hf_path
    model = config.model
    name_mixers(*mixer_names(model))
    torch.manual_seed(train.seed_everything)
    source = _teacher(config, teacher_path) if teacher_path else None
    teacher = None if source is None else teacher_blueprint(source)
    student, origin_of = _starting_student(config, teacher_path)
    config = named_where_kept(config, student.config)
    gets_layers = is_without_layers(config, student.config)
    as_loaded = before_layers(config, student.config) if gets_layers else config
    check_student(as_loaded, student.config, None if teacher is None else teacher.config)
    folder = run_folder(config, student.config)
    processes.from_first(lambda: check_new(folder))
    check_hardware(train)
    notes: Mapping[str, str] = {}
    if gets_layers:
        kept = with_layers(config, student, source, folder, console, processes)
        config, student, notes = kept.config, kept.student, kept.notes
    models = build_models(config, student, teacher, processes)
    origin = origin_of()
    parent = f"{origin} ({_listed(models.ways)})" if models.ways else origin
    for note in () if source is None else source.notes:
        console.line(note)
    console.line(f"{stage_of(train)}: from {parent} to {folder}")
    return run_stage(
        config, models.student, models.teacher, folder, console, parent=parent, processes=processes, notes=notes
    )


def _with_teacher(config: Config) -> Config:
    """The configuration, in which an align stage without a teacher gets the model that its student is set up from."""
    train = config.train
    if stage_of(train) != "align" or train.teacher.path or train.teacher.hf_path:
        return config
    start = starting_point(train.load_model)
    if start is None:
        origin = config.model.hf_path
    else:
        origin = str(start) if is_weights_file(start) and is_teachers(open_weights(start)) else ""
    if not origin:
        return config
    sizes = replace(train.teacher.model, **{key: getattr(config.model, key) for key in SIZE_KEYS})
    return replace(config, train=replace(train, teacher=replace(train.teacher, path=origin, model=sizes)))


def check_student(config: Config, student: RadladsConfig, teacher: RadladsConfig | None) -> None:
    """Raise ValueError if the models are not of the sizes and mixers that are configured, or do not fit each other."""
    check_sizes(config.model, "model", student.to_dict())
    if teacher is not None:
        check_sizes(config.train.teacher.model, "train.teacher.model", teacher.to_dict())
    _check_mixers(config, student)
    _check_settings(config.model, student)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if teacher is not None and getattr(teacher, name) != getattr(student, name):
            raise ValueError(
                f"the teacher's {name} is {getattr(teacher, name)}, the student's "
                f"{getattr(student, name)}: they are not the same model"
            )


def _check_mixers(config: Config, student: RadladsConfig) -> None:
    """Raise ValueError if the student's layers do not have the mixers that are configured, or none is to be aligned."""
    wanted, found = layer_mixers(config.model, student.num_hidden_layers), student.time_mixers
    if stage_of(config.train) == "align" and all(mixer_class(name).state_grows for name in wanted):
        if config.model.softmax_layers or config.model.layer_mixers:
            raise ValueError(
                "model.softmax_layers and model.layer_mixers leave no layer with a mixer to align: name fewer layers"
            )
        raise ValueError(
            f"model.tmix is {config.model.tmix!r}, so no layer has a mixer to align: pass the mixer's file with -c, "
            "after the size file, which names the teacher's attention"
        )
    if found == wanted:
        return
    if Counter(found) == Counter(wanted):
        layer = next(layer for layer, name in enumerate(wanted) if found[layer] != name)
        raise ValueError(
            f"{config.train.load_model} has {found[layer]} in layer {layer}, but the configuration names "
            f"{wanted[layer]} there: give the layers of the model itself"
        )
    softmax = [layer for layer, name in enumerate(found) if name == SOFTMAX and wanted[layer] != SOFTMAX]
    if len(softmax) < len(found) and all(found[layer] == wanted[layer] for layer in {*range(len(found))} - {*softmax}):
        raise ValueError(
            f"{config.train.load_model} keeps softmax in layers {listed(softmax)}, where the configuration names "
            "another mixer: give model.softmax_layers as the stage before ran with it, in its config.yaml"
        )
    raise ValueError(
        f"{config.train.load_model} holds the mixers {_counted(found)}, but the configuration "
        f"names {_counted(wanted)}: pass the model's own mixer file with -c"
    )


def _check_settings(model: ModelConfig, student: RadladsConfig) -> None:
    """Raise ValueError for a mixer's setting that is given and is not the student's own."""
    if not model.mixer:
        return
    kinds = {name: mixer_class(name).Settings for name in student.time_mixers}
    for name, values in settings_by_mixer(kinds, model.mixer).items():
        held = asdict(settings_from(kinds[name], student.mixer_settings.get(name, {})))
        if different := [key for key in values if key in model.mixer and values[key] != held[key]]:
            key = different[0]
            raise ValueError(
                f"model.mixer.{key} is {values[key]!r}, but {name} in the model has {held[key]!r}: give the value of "
                "that very model, or none"
            )


def _counted(mixers: list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(mixers).items())


def run_folder(config: Config, student: RadladsConfig) -> Path:
    """proj_dir/proj_name, or the released system's name made of layers, width, mixers and suffixes."""
    train, model = config.train, config.model
    if train.proj_name:
        return Path(train.proj_dir) / train.proj_name
    size = f"L{student.num_hidden_layers}-D{student.hidden_size}"
    words = [size, f"{model.tmix}_{model.tmix2 or SOFTMAX_MIXER}", train.proj_suffix0, train.proj_suffix]
    return Path(train.proj_dir) / re.sub(r"[^\w.-]", "_", "-".join(word for word in words if word))


def _starting_student(config: Config, teacher_path: str) -> tuple[Blueprint, Callable[[], str]]:
    """The student to begin with, and what says where it comes from, after hashing the weights it names."""
    train, path = config.train, starting_point(config.train.load_model)
    if path is not None:
        if path.is_file() or is_weights_file(path) or (path.is_dir() and not (path / "config.json").exists()):
            return _student_without_config(config, path, teacher_path)
        return stored_blueprint(path), lambda: _with_hash(path)
    if stage_of(train) != "align":
        raise ValueError(
            f"the {stage_of(train)} stage starts from an earlier stage's model: "
            "name its folder with --train.load_model out/..."
        )
    origin = config.model.hf_path or teacher_path
    if not origin:
        raise ValueError("the align stage needs a teacher: name its folder or hub name with --train.teacher.hf_path")
    if is_weights_file(Path(origin)):
        return _student_without_config(config, Path(origin), teacher_path)
    source = open_teacher(origin)
    return student_blueprint(source, config.model), lambda: f"setup of {source.folder}"


def _student_without_config(config: Config, path: Path, teacher_path: str) -> tuple[Blueprint, Callable[[], str]]:
    """As _starting_student, of a weights file: an earlier stage's, or set up to align if it is the teacher's."""
    weights = open_weights(path)
    described = [config.model.hf_path, teacher_path, config.train.teacher.hf_path]
    shape = _shape(weights, path, described, config.model)
    if stage_of(config.train) == "align" and is_teachers(weights):
        return student_from_teacher(weights, shape, config.model, path), lambda: f"setup of {_with_hash(path)}"
    return student_of(weights, shape, config.model, path), lambda: _with_hash(path)


def _with_hash(path: Path) -> str:
    """The path of weights, and the beginning of their hash, which takes about two seconds a gigabyte."""
    return f"{path} sha256:{(weights_hash(path) if path.is_dir() else sha256(path))[:16]}"


def _teacher(config: Config, path: str) -> TeacherSource:
    """The teacher of a folder, hub name or weights file."""
    if not is_weights_file(Path(path)):
        return open_teacher(path)
    if not Path(path).exists():
        raise ValueError(
            f"the teacher's weights {path} do not exist: make them with `python3 convert_hf_to_pth.py FOLDER {path}`, "
            "or name the teacher's folder or hub name with --train.teacher.path"
        )
    weights, described = open_weights(Path(path)), [config.train.teacher.hf_path, config.model.hf_path]
    return teacher_source(Path(path), _shape(weights, Path(path), described, config.train.teacher.model), weights)


def _shape(weights: StoredWeights, path: Path, described: list[str], model: ModelConfig) -> RadladsConfig:
    """The softmax model's configuration: by the first of `described` that is a folder, else by tensors and `model`."""
    for name in described:
        if name and not is_weights_file(Path(name)):
            folder = locate_tokenizer(name)
            return teacher_config(read_config(folder, *SUPPORTED_ARCHITECTURES), folder)
    return shape_of(weights, model, path)


def _listed(ways: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {action}" for action, count in ways.items())
