"""The page's sections on what was measured of the models: tasks, long texts, speed and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from radlads.report import html
from radlads.report.charts import Chart
from radlads.report.run_facts import (
    MODELS,
    by_position,
    command_text,
    measured_models,
    model_folders,
    teacher_path,
)
from radlads.report.run_folder import EVALUATION, LONG_CONTEXT, Run
from radlads.report.wording import NOT_MEASURED, bytes_in_words, chance_text, ratio_text, score_text


def long_context(run: Run, drawn: Sequence[Chart], *parts: str) -> list[str]:
    """The charts of parts of radlads longcontext, and which part of which model is missing."""
    if not drawn:
        what = "by length" if parts == ("costs",) else ""
        return [html.missing(_long_context_command(run), what=what)]
    models = measured_models(run)
    gaps = [f"{part} of the {name}" for part in parts for name in MODELS if not models.get(name, {}).get(part)]
    if parts == ("costs",) and not any(each.name == "cost-peak-bytes" for each in drawn):
        gaps.append("peak memory by length, which only CUDA tells")
    return html.with_gaps(html.charts(drawn), gaps)


def tasks(run: Run) -> str:
    """radlads eval's table, a row for each task and metric, a column for each model."""
    scores = (run.evaluation or {}).get("scores")
    if not scores:
        words = ["eval", *map(str, model_folders(run)), "--teacher", teacher_path(run), "--baselines"]
        return html.missing(command_text(*words, "--tasks", "paper", "--output", str(run.folder / EVALUATION)))
    models = list(dict.fromkeys(score["model"] for score in scores))
    found = {(score["task"], score["metric"], score["model"]): score for score in scores}
    rows = []
    for task, metric in dict.fromkeys((score["task"], score["metric"]) for score in scores):
        present = [found.get((task, metric, model)) for model in models]
        first = next(score for score in present if score is not None)
        chance = chance_text(first["chance"])
        rows.append([task, metric, f"{first['num_questions']:,}", chance, *map(_score, present)])
    note = (
        "± one standard error. In brackets the score relative to the teacher's, (score − chance) / (teacher − chance); "
        "left out where the teacher itself is within two standard errors of chance."
    )
    return html.table(["task", "metric", "questions", "chance", *models], rows) + html.paragraph(note, "note")


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return NOT_MEASURED
    return score_text(score["value"], score["stderr"], score.get("relative"), is_share=score["chance"] is not None)


def loss_note(run: Run) -> str:
    """What text the losses by position are of; nothing where there are none."""
    models = measured_models(run)
    if not any(model.get("loss") for model in models.values()):
        return ""
    text = (run.long_context or {})["settings"]["text"]
    bins = next(model["loss"] for model in models.values() if model.get("loss"))
    tokens = sum(each["num_tokens"] for each in bins)
    return html.paragraph(f"{tokens:,} tokens of {text}, windows of {bins[-1]['end']:,}.", "note")


def retrieval_note(run: Run) -> str:
    """How the facts were asked for; nothing where they were not."""
    if run.long_context is None or not run.long_context["settings"].get("tasks"):
        return ""
    settings = run.long_context["settings"]
    kinds = []
    if "passkey" in settings["tasks"]:
        kinds.append(f"passkey: {settings['tasks']['passkey']['digits']} digits among sentences repeated")
    if "needle" in settings["tasks"]:
        kinds.append(f"needle: {settings['tasks']['needle']['digits']} digits within {settings['text']}")
    return html.paragraph(
        f"Percent of {settings['num_samples']} prompts in each cell that are continued with exactly the number told, "
        f"every token of it, greedily; a standard error of at most {50 / settings['num_samples'] ** 0.5:.1f}. "
        f"{'; '.join(kinds)}. Depth 0 is the start of the prompt. First seed "
        f"{settings['seed']}.",
        "note",
    )


def costs(run: Run) -> list[str]:
    """State and decoding time at a few positions, as summary.json has them."""
    summary = run.summary or {}
    states, speeds = by_position(summary.get("bytes", {})), by_position(summary.get("decode_ms", {}))
    rows = [
        [f"state at {tokens:,} tokens", bytes_in_words(teacher), bytes_in_words(student), ratio_text(teacher / student)]
        for tokens, teacher, student in states
    ]
    rows += [
        [f"token at position {tokens:,}", f"{teacher:.2f} ms", f"{student:.2f} ms", ratio_text(teacher / student)]
        for tokens, teacher, student in speeds
    ]
    gaps = [] if states else [html.missing(what="state of teacher and student at a few lengths")]
    gaps += [] if speeds else [html.missing(what="time of a token of teacher and student at a few positions")]
    if not rows:
        return gaps
    note = (
        "One sequence. State: computed from the model's sizes, keys and values in bf16, recurrent states in fp32. "
        "The teacher's token is timed in this project's softmax layers, without a CUDA graph. "
        "× is the teacher's over the student's."
    )
    return [html.table(["", "teacher", "student", "×"], rows), html.paragraph(note, "note"), *gaps]


def costs_note(run: Run) -> str:
    """How the charts of costs were measured; nothing where there are none."""
    if not any(model.get("costs") for model in measured_models(run).values()):
        return ""
    settings = (run.long_context or {})["settings"]
    return html.paragraph(
        f"Charts: one sequence, {settings['dtype']}, {settings['device']}. State: the bytes of what a model's cache "
        "holds after reading. Peak memory: the most that was allocated while reading and generating, beside the "
        "weights.",
        "note",
    )


def _long_context_command(run: Run) -> str:
    words = ["longcontext", str(model_folders(run)[-1]), "--teacher", teacher_path(run)]
    return command_text(*words, "--out", str(run.folder / LONG_CONTEXT.parent))
