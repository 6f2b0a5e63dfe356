"""What lm-eval found, as rows to compare models by: scores, chance levels, relative scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radlads.report.wording import chance_text, score_text

# The paper's tasks, and the metric it gives of each
PAPER = {
    "lambada_openai": "acc",
    "mmlu": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "winogrande": "acc",
}
SUITES = {"paper": tuple(PAPER)}
_SHARES = {"acc", "acc_norm", "exact_match"}  # of right answers; what else there is has no chance level

_NOT_ASKED = -1  # RULER's score at a length that has no questions; its metrics are lengths


@dataclass(frozen=True)
class Score:
    """A model's score on one task. chance: that of guessing, None where guessing has no score. stderr: nan where
    lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float
    num_questions: int
    chance: float | None

    def relative_to(self, teacher: "Score") -> float | None:
        """(score - chance) / (teacher's - chance); None where the teacher itself is within two standard errors of
        chance, or guessing has no score."""
        if self.chance is None or math.isnan(teacher.stderr) or teacher.value - self.chance <= 2 * teacher.stderr:
            return None
        return (self.value - self.chance) / (teacher.value - self.chance)


def task_names(names: Sequence[str]) -> list[str]:
    """The names with suites in place of their names, each once."""
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def scores(results: Mapping[str, Any]) -> list[Score]:
    """The scores in lm-eval's results: of groups as a whole, of tasks that are in none; of the paper's tasks the
    paper's metric, of others every metric."""
    inside = {child for children in results.get("group_subtasks", {}).values() for child in children}
    return [score for task in results["results"] if task not in inside for score in _scores_of(task, results)]


def _scores_of(task: str, results: Mapping[str, Any]) -> list[Score]:
    found = []
    leaves = _leaves(task, results)
    num_questions = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
    values = results["results"][task]
    for key, value in values.items():
        metric, comma, chosen_by = key.partition(",")
        if not comma or metric.endswith("_stderr") or PAPER.get(task, metric) != metric:
            continue
        if metric.isdigit() and value == _NOT_ASKED:
            continue
        stderr = values.get(f"{metric}_stderr,{chosen_by}")
        name = metric if chosen_by == "none" else f"{metric} {chosen_by}"
        error = float(stderr) if isinstance(stderr, int | float) else math.nan
        found.append(Score(task, name, float(value), error, num_questions, _chance(leaves, metric, results)))
    return found


def _leaves(task: str, results: Mapping[str, Any]) -> list[str]:
    """The tasks that a group consists of; a task itself."""
    children = results.get("group_subtasks", {}).get(task, [])
    return [leaf for child in children for leaf in _leaves(child, results)] or [task]


def _chance(leaves: Sequence[str], metric: str, results: Mapping[str, Any]) -> float | None:
    """The mean over questions of 1 / choices; 0 where an answer is a text."""
    if metric not in _SHARES:
        return None
    guesses: list[float] = []
    for leaf in leaves:
        kind = results["configs"][leaf]["output_type"]
        if kind == "multiple_choice":
            guesses += [1 / len(sample["resps"]) for sample in results["samples"][leaf]]
        else:
            guesses += [0.0] * len(results["samples"][leaf])
    return sum(guesses) / len(guesses)


def table(scores_by_model: Mapping[str, Sequence[Score]], teacher: str | None = None) -> list[str]:
    """Lines to print: a task's metric each, a model's score and standard error in each column, and what it is relative
    to the teacher's."""
    columns = list(scores_by_model)
    rows = [["task", "metric", "questions", "chance", *columns]]
    for scored in zip(*scores_by_model.values(), strict=True):
        first, reference = scored[0], scored[columns.index(teacher)] if teacher else None
        cells = [_cell(score, None if score is reference else reference) for score in scored]
        rows.append([first.task, first.metric, f"{first.num_questions:,}", chance_text(first.chance), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(score: Score, teacher: Score | None) -> str:
    relative = None if teacher is None else score.relative_to(teacher)
    return score_text(score.value, score.stderr, relative, is_share=score.chance is not None)
