"""A run's folder, read: what `radlads demo`, `train`, `eval` and `longcontext` left in it. Computes nothing."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from radlads.checkpoint.manifest import MANIFEST
from radlads.checkpoint.weights import SafetensorsFolder
from radlads.checksums import sha256
from radlads.files import read_json

SUMMARY = "summary.json"
EVALUATION = "eval.json"
LONG_CONTEXT = Path("longcontext") / "longcontext.json"
SELECTION = "layers.json"
EXPORT = "hf"
_CELL = ("length_tokens", "depth", "num_right", "num_samples")
_LONG_CONTEXT_COLUMNS = {
    "passkey": _CELL,
    "needle": _CELL,
    "loss": ("first", "end", "loss", "num_tokens"),
    "costs": ("context_tokens", "prefill_tokens_per_s", "decode_ms", "state_bytes"),
}
_ORDER = ("align", "distill", "extend", "instruct")


@dataclass(frozen=True)
class Stage:
    """A finished stage. metrics, heldout: rows of the CSV files, empty cells left out. recipe: config.yaml's text."""

    folder: Path
    manifest: Mapping[str, Any]
    model: Mapping[str, Any]
    metrics: list[dict[str, float]]
    heldout: list[dict[str, float]]
    recipe: str

    @property
    def name(self) -> str:
        """align, distill, extend or instruct."""
        return str(self.manifest["stage"])

    @property
    def config(self) -> Mapping[str, Any]:
        """config.yaml's content. Raises ValueError if it is damaged."""
        try:
            content = yaml.safe_load(self.recipe)
        except yaml.YAMLError as error:
            raise ValueError(f"{self.folder / 'config.yaml'} is damaged: it is not YAML") from error
        return content if isinstance(content, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured of a folder's models, by the files in it; None for what was not."""

    summary: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    long_context: Mapping[str, Any] | None
    selection: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Run(Measurements):
    """What a run's folder holds."""

    folder: Path
    stages: list[Stage]
    num_parameters: int

    @property
    def student(self) -> Mapping[str, Any]:
        """config.json of the last stage."""
        return self.stages[-1].model

    @property
    def export(self) -> Path | None:
        """The folder of the exported model."""
        path = self.folder / EXPORT
        return path if (path / "config.json").is_file() else None


def by_name(stages: Sequence[Stage]) -> dict[str, Stage]:
    """Stages by their names, by name and folder where a stage was run more than once."""
    counts = Counter(stage.name for stage in stages)
    return {stage.name if counts[stage.name] == 1 else f"{stage.name} {stage.folder.name}": stage for stage in stages}


def num_parameters(folder: Path) -> int:
    """Parameters in a folder's safetensors files, whose headers alone are read; 0 where they are no longer there."""
    if not any(folder.glob("*.safetensors")):
        return 0
    weights = SafetensorsFolder(folder)
    return sum(math.prod(weights.info(name).shape) for name in weights)


def read_run(folder: Path) -> Run:
    """The run in a folder: a conversion's, one with stage folders in it, or a stage's own.

    Raises ValueError if there is no finished stage, or a file is damaged.
    """
    stages = sorted((_read_stage(path) for path in _stage_folders(folder)), key=_place)
    if not stages:
        raise ValueError(f"{folder} holds no finished stage: name the folder of a conversion, or one of stage folders")
    measured, folders = read_measurements(folder), [stage.folder for stage in reversed(stages)]
    return Run(
        folder=folder,
        stages=stages,
        num_parameters=num_parameters(stages[-1].folder),
        summary=measured.summary,
        evaluation=measured.evaluation,
        long_context=measured.long_context,
        selection=next((each for each in map(_selection_in, (folder, *folders)) if each), None),
    )


def read_measurements(folder: Path) -> Measurements:
    """What lies in a folder of any kind. Raises ValueError for a damaged file."""
    return Measurements(
        summary=_checked(folder / SUMMARY, _check_summary),
        evaluation=_checked(folder / EVALUATION, _check_evaluation),
        long_context=_checked(folder / LONG_CONTEXT, _check_long_context),
        selection=_selection_in(folder),
    )


def _selection_in(folder: Path) -> Mapping[str, Any] | None:
    """What radlads select found, or the selection that a stage began with."""
    return _checked(folder / SELECTION, _check_selection)


def _checked(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """A JSON file, if it is there. Raises ValueError if `check` misses something in it."""
    content = _json(path)
    try:
        if content is not None:
            check(content)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks {error} or is of another version: measure again, or remove it") from error
    return content


def _check_summary(summary: dict[str, Any]) -> None:
    for step in ("teacher", "setup", *_ORDER, "retied"):
        if step in summary:
            _need(summary[step], "loss", "kl", "top1")
    _need(summary.get("sample", {"prompt": ""}), "prompt")


def _check_evaluation(evaluation: dict[str, Any]) -> None:
    for score in evaluation["scores"]:
        _need(score, "task", "metric", "model", "value", "stderr", "chance", "num_questions")


def _check_long_context(results: dict[str, Any]) -> None:
    _need(results["settings"], "num_samples", "seed", "text", "device", "dtype", "tasks")
    for model in results["models"].values():
        for part, columns in _LONG_CONTEXT_COLUMNS.items():
            for row in model.get(part, ()):
                _need(row, *columns)


def _check_selection(record: dict[str, Any]) -> None:
    _need(record, "layers", "text")
    by = record["by"]
    for row in (*record["curve"], *record["uniform"]):
        _need(row, "layers", by)
    for values in record["rounds"][0]["values"].values():
        _need(values, by)


def _need(row: dict[str, Any], *columns: str) -> None:
    for column in columns:
        row[column]


def read_csv(path: Path) -> list[dict[str, float]]:
    """Rows of a file of numbers, one at least, empty cells left out.

    Raises ValueError for a file that is empty, cut short, or not of numbers: of what was not measured there is none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    if not rows:
        raise _damaged(path, "is empty")
    if not text.endswith("\n") or any(len(row) != len(header) for row in rows):
        raise _damaged(path, "is cut short")
    try:
        return [{name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in rows]
    except ValueError as error:
        raise _damaged(path, "holds something else than numbers") from error


def _read_log(path: Path, hashes: Mapping[str, str]) -> list[dict[str, float]]:
    """read_csv, of a file that has its hash among these if they know it; nothing where there is no file."""
    if not path.is_file():
        return []
    rows = read_csv(path)
    if path.name in hashes and sha256(path) != hashes[path.name]:
        raise _damaged(path, f"is not the file its {MANIFEST} describes")
    return rows


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: it {what}; copy it anew, or remove it to have it called not measured")


def _stage_folders(folder: Path) -> Iterator[Path]:
    if (folder / MANIFEST).is_file():
        yield folder
    elif folder.is_dir():
        yield from (path.parent for path in folder.glob(f"*/{MANIFEST}") if path.parent.suffix != ".partial")


def _read_stage(folder: Path) -> Stage:
    manifest = read_json(folder / MANIFEST)
    if manifest.get("stage") not in _ORDER:
        raise ValueError(f"{folder / MANIFEST} is damaged: run the stage again")
    recipe = folder / "config.yaml"
    return Stage(
        folder=folder,
        manifest=manifest,
        model=_json(folder / "config.json") or {},
        metrics=_read_log(folder / "metrics.csv", manifest.get("sha256", {})),
        heldout=_read_log(folder / "heldout.csv", manifest.get("sha256", {})),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def _place(stage: Stage) -> tuple[int, str]:
    return _ORDER.index(stage.name), stage.folder.name


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
