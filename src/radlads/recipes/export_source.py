"""Which model a run's folder stands for, who its teacher was, and the stages that led to it."""

from dataclasses import dataclass
from pathlib import Path

from radlads.checkpoint.manifest import (
    MANIFEST,
    check_model_files,
    joint_hash,
    read_manifest,
)
from radlads.checkpoint.tokenizer_files import (
    locate_tokenizer,
    read_tokenizer,
)
from radlads.files import read_json
from radlads.recipes.conversion_folder import MARKER, SUMMARY
from radlads.recipes.model_card import CARD, EarlierCard, read_card
from radlads.recipes.stage_configs import INSTRUCT, STAGES
from radlads.report.run_folder import Measurements, Stage, read_measurements, read_run


@dataclass(frozen=True)
class Source:
    """The model of a run. tokenizer_folder: the teacher's, where its licence is too.

    retied: the conversion ended by dropping the head for the embedding. stages: those that led to the model. earlier:
    the card of an export, which knows what its folder does not.
    """

    folder: Path
    tokenizer_folder: Path
    teacher_name: str | None
    measured: Measurements
    stages: list[Stage]
    retied: bool
    earlier: EarlierCard | None = None


def find_source(run: Path, teacher: str | None) -> Source:
    """The model that a run's folder stands for, its weights checked against the manifest.

    Raises ValueError for an unfinished conversion, a folder without a model, weights that are not the manifest's, or a
    teacher that is neither recorded nor named.
    """
    if (run / "config.json").is_file() and not (run / MANIFEST).is_file():
        tokenizer_folder = run if teacher is None else locate_tokenizer(teacher)
        read_tokenizer(tokenizer_folder)
        check_model_files(run, whole=True)
        return Source(
            run, tokenizer_folder, teacher, read_measurements(run), [], retied=False, earlier=read_card(run / CARD)
        )
    folder = _last_stage(run)
    read_manifest(folder)
    (last,) = read_run(folder).stages
    stages = [*_ancestors(last), last]
    name = teacher or _teacher_named_by(stages)
    if name is None:
        raise ValueError(f"{run} does not say who its teacher was: name its folder with --teacher")
    measured = read_measurements(run)
    tokenizer_folder = _existing_teacher(name, named=teacher is not None)
    return Source(folder, tokenizer_folder, name, measured, stages, "retied" in (measured.summary or {}))


def _last_stage(run: Path) -> Path:
    """The folder of the stage that a conversion ended with; a stage's own."""
    if (run / MANIFEST).is_file():
        return run
    if (run / SUMMARY).is_file():
        stages = (*STAGES, INSTRUCT) if INSTRUCT in read_json(run / SUMMARY) else STAGES
        return run / f"{len(stages)}-{stages[-1]}"
    if (run / MARKER).is_file():
        raise ValueError(f"{run} is an unfinished conversion: start it again, or export one of its stages' folders")
    raise ValueError(f"{run} is no run: name the folder of a conversion, of a finished stage, or of a model")


def teacher_named_in(folder: Path) -> str | None:
    """The teacher that a stage's folder, or one of the stages before it, names. Raises ValueError as read_run."""
    (last,) = read_run(folder).stages
    return _teacher_named_by([*_ancestors(last), last])


def _teacher_named_by(stages: list[Stage]) -> str | None:
    return next((name for name in map(_teacher_of, reversed(stages)) if name), None)


def _existing_teacher(name: str, *, named: bool) -> Path:
    """The teacher's folder, which has a tokenizer."""
    try:
        folder = locate_tokenizer(name)
        read_tokenizer(folder)
    except ValueError as error:
        if named:
            raise
        raise ValueError(f"the run's teacher is not to be had ({error}): name its folder with --teacher") from error
    return folder


def _teacher_of(stage: Stage) -> str | None:
    """The teacher that a stage's configuration names, if any."""
    values = stage.config
    train, model = values.get("train") or {}, values.get("model") or {}
    teacher = train.get("teacher") or {}
    return teacher.get("hf_path") or model.get("hf_path") or teacher.get("path") or None


def _ancestors(stage: Stage) -> list[Stage]:
    """The stages before a stage, oldest first, as far as their folders are there and still what they were then."""
    origin, _, digest = str(stage.manifest.get("parent", "")).partition(" sha256:")
    for folder in (stage.folder.parent / Path(origin).name, Path(origin)):
        if digest and (folder / MANIFEST).is_file():
            (parent,) = read_run(folder).stages
            if _recorded_digest(parent).startswith(digest):
                return [*_ancestors(parent), parent]
    return []


def _recorded_digest(stage: Stage) -> str:
    """manifest.weights_hash by the manifest's own hashes, which are not computed again."""
    return joint_hash(stage.manifest.get("sha256") or {})
