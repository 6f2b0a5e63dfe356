"""What several sections of the page say of a run: names, versions, measurements by model, commands."""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radlads.report.run_folder import EXPORT, Run
from radlads.report.wording import mixer_title

MODELS = ("teacher", "student")


def teacher_name(run: Run) -> str:
    """The folder or hub name of the teacher, as the first stage's configuration has it."""
    teacher = run.stages[0].config.get("train", {}).get("teacher", {})
    name = teacher.get("path") or teacher.get("hf_path") or "teacher"
    return Path(name).name or name


def mixers(model: Mapping[str, Any]) -> str:
    """A model's time mixers in words, counted where there are several."""
    counts = Counter(model.get("time_mixers", ()))
    if len(counts) == 1:
        return mixer_title(next(iter(counts)))
    return " + ".join(f"{count} × {mixer_title(name)}" for name, count in counts.items()) or "student"


def by_position(values: Mapping[str, Mapping[str, float]]) -> list[tuple[int, float, float]]:
    """(position, teacher's, student's) of what summary.json holds by model and position."""
    teacher, student = (values.get(name, {}) for name in MODELS)
    return [(int(position), teacher[position], student[position]) for position in student if position in teacher]


def run_versions(run: Run) -> Mapping[str, Any]:
    """Of the packages that the last stage ran with."""
    versions: Mapping[str, Any] = run.stages[-1].manifest.get("versions", {})
    return versions


def measured_models(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """What radlads longcontext measured, teacher first."""
    models = (run.long_context or {}).get("models", {})
    return {name: models[name] for name in MODELS if name in models}


def teacher_path(run: Run) -> str:
    """The teacher's folder or hub name, for a command."""
    teacher = run.stages[0].config.get("train", {}).get("teacher", {})
    return str(teacher.get("path") or teacher.get("hf_path") or "TEACHER")


def model_folders(run: Run) -> list[Path]:
    """The stages, and the export in place of the last one."""
    folders = [stage.folder for stage in run.stages]
    return folders if run.export is None else [*folders[:-1], run.folder / EXPORT]


def command_text(*words: str) -> str:
    """A radlads command, each option on a line of its own."""
    return shlex.join(["radlads", *words]).replace(" --", " \\\n    --")
