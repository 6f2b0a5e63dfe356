"""`radlads eval`: models on tasks, side by side. Models are loaded one at a time."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radlads.checkpoint.manifest import versions, weights_hash
from radlads.checksums import sha256
from radlads.console import Console
from radlads.evaluation.scores import SUITES, Score, scores, table, task_names
from radlads.files import write_text

if TYPE_CHECKING:
    import torch

    from radlads.evaluation.harness import Settings, Tasks
    from radlads.model.modeling import RadladsForCausalLM

TEACHER, WINDOWED, SETUP = "teacher", "teacher 64+4", "setup"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate, and how. folders: model folders or hub names. tokenizer: a folder or hub name, instead of the
    models' own. metadata: what lm-eval's tasks are told (open_tasks)."""

    folders: Sequence[str]
    tasks: Sequence[str]
    settings: "Settings"
    teacher: str | None = None
    baselines: bool = False
    include_path: Path | None = None
    metadata: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    device: str = "auto"
    cache: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.baselines and self.teacher is None:
            raise ValueError("--baselines needs --teacher: both are made of its weights")
        if not self.tasks:
            raise ValueError("--tasks names no task: leave it out for the paper's")
        if self.settings.batch_rows < 1:
            raise ValueError(f"--batch-size must be 1 or more, not {self.settings.batch_rows}")
        if self.settings.limit is not None and not 0 < self.settings.limit < math.inf:
            raise ValueError(f"--limit must be a number above 0, not {self.settings.limit}")
        if self.settings.max_tokens is not None and self.settings.max_tokens < 1:
            raise ValueError(f"--max-length must be 1 or more, not {self.settings.max_tokens}")
        if self.settings.num_fewshot is not None and self.settings.num_fewshot < 0:
            raise ValueError(f"--num-fewshot must be 0 or more, not {self.settings.num_fewshot}")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise ValueError(f"{self.output.parent} is not a folder: create it first")
        if self.output is not None and self.output.is_dir():
            raise ValueError(f"{self.output} is a folder: name the file to write")
        if self.output is not None and self.output.exists():
            raise ValueError(f"{self.output} exists already: remove it, or choose another --output")


@dataclass(frozen=True)
class _Entry:
    """One column: a model that is loaded when its turn comes. made_of: what beside its folder decides its answers."""

    label: str
    folder: Path
    load: Callable[[], "RadladsForCausalLM"]
    made_of: tuple[object, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads eval`, lm-eval's own spelling with underscores included."""
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="models: folders of any stage or export, or hub names"
    )
    parser.add_argument(
        "--tasks",
        default="paper",
        help=f"comma-separated lm-eval tasks, groups or patterns; paper (default): {', '.join(SUITES['paper'])}",
    )
    parser.add_argument("--teacher", metavar="DIR", help="evaluate it too, and give scores relative to it")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="two more columns: the teacher with attention to 64 tokens and 4 sinks, the first DIR before any training",
    )
    parser.add_argument("--batch-size", "--batch_size", type=int, default=8, help="texts at a time (default 8)")
    parser.add_argument("--num-fewshot", "--num_fewshot", type=int, help="examples before each question")
    parser.add_argument("--limit", type=float, help="questions of each task, or a share below 1: for a first look")
    parser.add_argument(
        "--max-length",
        "--max_length",
        type=int,
        help="tokens of one text, the model's own number by default; a recurrent model may have any",
    )
    parser.add_argument(
        "--apply-chat-template", "--apply_chat_template", action="store_true", help="questions as a user's messages"
    )
    parser.add_argument("--include-path", "--include_path", type=Path, metavar="DIR", help="task files of your own")
    parser.add_argument(
        "--metadata",
        metavar="JSON",
        help="for tasks that make their own questions, such as RULER's: '{\"max_seq_lengths\": [1024, 4096]}'",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="for all models (default: each one's own, else the teacher's)"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep answers there, and go on from them")
    parser.add_argument(
        "--output", "--output_path", type=Path, metavar="FILE", help="write lm-eval's results and the table as JSON"
    )


def evaluation_of(arguments: argparse.Namespace) -> Evaluation:
    """The evaluation that add_options' arguments describe. Raises ValueError for values that make none."""
    from radlads.evaluation.harness import Settings

    settings = Settings(
        batch_rows=arguments.batch_size,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        max_tokens=arguments.max_length,
        chat_template=arguments.apply_chat_template,
    )
    return Evaluation(
        folders=arguments.folders,
        tasks=[name.strip() for name in arguments.tasks.split(",") if name.strip()],
        settings=settings,
        teacher=arguments.teacher,
        baselines=arguments.baselines,
        include_path=arguments.include_path,
        metadata=None if arguments.metadata is None else _metadata(arguments.metadata),
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        cache=arguments.cache,
        output=arguments.output,
    )


def _metadata(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'--metadata is not JSON ({error}): write {{"max_seq_lengths": [4096]}}') from error
    if not isinstance(values, dict):
        raise ValueError('--metadata must be a JSON object: write {"max_seq_lengths": [4096]}')
    return values


def evaluate(evaluation: Evaluation, console: Console) -> list[str]:
    """Run every model on every task, write --output, and return the table's lines; none in processes that only help.

    Raises ValueError for folders that are no model, unknown tasks, or a missing lm-eval or tokenizer; OSError for data
    sets that cannot be fetched.
    """
    from radlads.checkpoint.tokenizer_files import read_tokenizer
    from radlads.evaluation.harness import open_tasks, share_work
    from radlads.evaluation.models import notes_on
    from radlads.inference.chat_template import ChatTemplate
    from radlads.inference.generate import choose_device

    device, dtype = choose_device(evaluation.device)
    entries = list(_entries(evaluation, dtype))
    for entry in entries:  # what is wrong with the last model's is told before the first one runs
        folder = _tokenizer_folder(entry.folder, evaluation)
        read_tokenizer(folder)
        if evaluation.settings.chat_template:
            ChatTemplate(folder, sys.maxsize)
    tells = share_work(device)
    tasks = open_tasks(task_names(evaluation.tasks), evaluation.include_path, _told(entries, evaluation))
    results = {}
    for entry in entries:
        if tells:
            for line in (f"{entry.label}: {entry.folder}", *notes_on(entry.folder)):
                console.line(line)
        if (result := _results(entry, tasks, evaluation, device)) is not None:
            results[entry.label] = result
    if not tells:
        return []
    found = {label: scores(result) for label, result in results.items()}
    if evaluation.output is not None:
        write_results(evaluation, results, found)
    return table(found, TEACHER if evaluation.teacher else None)


def _told(entries: Sequence[_Entry], evaluation: Evaluation) -> dict[str, Any] | None:
    """--metadata, with the first model's tokenizer, by which RULER measures lengths, unless it names one."""
    if evaluation.metadata is None:
        return None
    return {"tokenizer": str(_tokenizer_folder(entries[0].folder, evaluation)), **evaluation.metadata}


def write_results(evaluation: Evaluation, results: dict[str, Any], found: dict[str, list[Score]]) -> None:
    """Write lm-eval's results by model, without the single questions, and the scores of the table."""
    references = {(score.task, score.metric): score for score in found.get(TEACHER, [])}
    rows = [
        {key: None if value != value else value for key, value in asdict(score).items()}
        | {"model": label, "relative": _relative(score, references)}
        for label, scored in found.items()
        for score in scored
    ]
    brief = {label: {key: value for key, value in each.items() if key != "samples"} for label, each in results.items()}
    content = {"folders": list(evaluation.folders), "teacher": evaluation.teacher, "versions": versions()}
    assert evaluation.output is not None
    write_text(
        evaluation.output, json.dumps(content | {"scores": rows, "lm_eval": brief}, indent=2, default=str) + "\n"
    )


def _relative(score: Score, references: dict[tuple[str, str], Score]) -> float | None:
    teacher = references.get((score.task, score.metric))
    return None if teacher is None or teacher is score else score.relative_to(teacher)


def _results(entry: _Entry, tasks: "Tasks", evaluation: Evaluation, device: "torch.device") -> dict[str, Any] | None:
    from radlads.convert.hf_source import open_tokenizer
    from radlads.evaluation.harness import run_tasks

    model = entry.load().to(device)  # type: ignore[arg-type]
    folder = _tokenizer_folder(entry.folder, evaluation)
    tokenizer = open_tokenizer(folder, model.config.vocab_size)
    cache = None if evaluation.cache is None else evaluation.cache / _fingerprint(entry, folder, evaluation)
    return run_tasks(model, tokenizer, tasks, evaluation.settings, cache=cache)


def _entries(evaluation: Evaluation, dtype: "torch.dtype") -> Iterator[_Entry]:
    """The columns, teacher first."""
    from radlads.convert.hf_source import locate, open_teacher
    from radlads.evaluation.baselines import setup_student, windowed_teacher
    from radlads.evaluation.models import model_config, open_model

    folders = [locate(folder) for folder in evaluation.folders]
    if evaluation.teacher is not None:
        source = open_teacher(evaluation.teacher)
        yield _Entry(TEACHER, source.folder, lambda: open_model(source.folder, dtype), (dtype,))
        if evaluation.baselines:
            yield _Entry(WINDOWED, source.folder, lambda: windowed_teacher(source, dtype), (dtype, WINDOWED))
            config = model_config(folders[0])
            made_of = (dtype, SETUP, config.to_json_string())
            yield _Entry(SETUP, source.folder, lambda: setup_student(config, source, dtype), made_of)
    for folder, label in zip(folders, _labels(folders), strict=True):
        model_config(folder)
        yield _Entry(label, folder, lambda folder=folder: open_model(folder, dtype), (dtype,))  # type: ignore[misc]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, their whole paths where names would stand twice."""
    names = [folder.resolve().name for folder in folders]
    clear = len({*names, TEACHER, WINDOWED, SETUP}) == len(names) + 3
    return names if clear else [str(folder) for folder in folders]


def _tokenizer_folder(folder: Path, evaluation: Evaluation) -> Path:
    """--tokenizer, else the model's own folder, else the teacher's."""
    from radlads.checkpoint.tokenizer_files import choose_tokenizer
    from radlads.convert.hf_source import locate

    teacher = [] if evaluation.teacher is None else [locate(evaluation.teacher)]
    return choose_tokenizer(evaluation.tokenizer, folder, *teacher)


def _fingerprint(entry: _Entry, tokenizer: Path, evaluation: Evaluation) -> str:
    """A file name that is another one for another model, precision, tokenizer, length or version."""
    from radlads import __version__

    names = [path for path in (tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json") if path.is_file()]
    files = [sha256(path) for path in (entry.folder / "config.json", *names)]
    parts = [
        *files,
        weights_hash(entry.folder),
        *map(str, entry.made_of),
        str(evaluation.settings.max_tokens),
        __version__,
    ]
    return f"{entry.folder.resolve().name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"
