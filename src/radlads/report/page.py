"""`radlads report`: a run's folder as one page and its charts as PNG. Every number comes from a file in that folder."""

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from radlads.files import write_text
from radlads.report import evaluation_sections, html, model_sections, training_sections
from radlads.report.charts import Chart
from radlads.report.plots import STEPS, conversion_charts, long_context_charts
from radlads.report.run_facts import by_position, measured_models, mixers, run_versions, teacher_name
from radlads.report.run_folder import Run, Stage, by_name, read_run
from radlads.report.selection import selection_charts, softmax_layers
from radlads.report.wording import NOT_MEASURED, NOT_RECORDED, gap_start, number_text, ratio_text

PAGE = "report.html"
PLOTS = "plots"


def write_page(folder: Path) -> Path:
    """Write RUN/report.html and RUN/plots/*.png, and return the page's path. Raises ValueError as read_run."""
    run = read_run(folder)
    before = conversion_charts(
        by_stage(run, lambda stage: stage.metrics), by_stage(run, lambda stage: stage.heldout), heldout_losses(run)
    )
    after = long_context_charts(measured_models(run))
    plots = folder / PLOTS
    plots.mkdir(exist_ok=True)
    for chart in [*before, *after, *selection_charts(run.selection)]:
        chart.save_png(plots)
    style = (files("radlads.report") / "page.css").read_text(encoding="utf-8")
    write_text(folder / PAGE, html.page(_title(run), style, _body(run, before, after)))
    return folder / PAGE


def by_stage(run: Run, rows: Callable[[Stage], list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """A stage's rows by its name, by name and folder where a stage was run more than once."""
    return {name: rows(stage) for name, stage in by_name(run.stages).items()}


def heldout_losses(run: Run) -> dict[str, float]:
    """By step, of the summary: one measurement on the same text for all. Nothing where there is no summary."""
    return {step: run.summary[step]["loss"] for step in ("teacher", *STEPS) if run.summary and step in run.summary}


def _body(run: Run, before: Sequence[Chart], after: Sequence[Chart]) -> list[str]:
    losses = [chart for chart in before if chart.name != "heldout"]
    retrieval = [chart for chart in after if chart.name.startswith(("passkey", "needle"))]
    position = [chart for chart in after if chart.name == "loss-by-position"]
    costs = [chart for chart in after if chart.name.startswith("cost-")]
    selected = softmax_layers(run)
    return [
        f"<header>\n<h1>{escape(_title(run))}</h1>",
        html.paragraph(_origin(run), "lead"),
        _headline(run) + "</header>",
        html.section("What was converted", html.facts(training_sections.conversion(run))),
        html.section("Recipe and budget", training_sections.recipe(run)),
        html.section("Training", *html.with_gaps(html.charts(losses), training_sections.gaps_in_training(run))),
        *([html.section("Which layers to keep as softmax", *selected)] if selected else []),
        html.section("Teacher and student on held-out text", training_sections.heldout(run, before)),
        html.section("Tasks", evaluation_sections.tasks(run)),
        html.section(
            "Loss by position",
            *evaluation_sections.long_context(run, position, "loss"),
            evaluation_sections.loss_note(run),
        ),
        html.section(
            "Facts in long texts",
            *evaluation_sections.long_context(run, retrieval, "passkey", "needle"),
            evaluation_sections.retrieval_note(run),
        ),
        html.section(
            "Speed and memory",
            *evaluation_sections.costs(run),
            *evaluation_sections.long_context(run, costs, "costs"),
            evaluation_sections.costs_note(run),
        ),
        html.section("Samples", model_sections.samples(run)),
        html.section("Loading the model", model_sections.loading(run)),
        html.section("Configuration and versions", model_sections.configuration(run)),
    ]


def _title(run: Run) -> str:
    return f"{teacher_name(run)} as {mixers(run.student)}"


def _origin(run: Run) -> str:
    stages = ", ".join(stage.folder.name for stage in run.stages)
    version = run_versions(run).get("radlads", f"(version {NOT_RECORDED})")
    return f"A conversion by radlads {version}. Stages: {stages}."


def _headline(run: Run) -> str:
    """The figures that a reader asks for first."""
    summary = run.summary
    if summary is None:
        return html.missing(what="teacher and student on the same text")
    last = summary.get(next((step for step in ("retied", *reversed(STEPS)) if step in summary), ""), {})
    loss = number_text(summary.get("teacher", {}).get("loss"), ".3f")
    found = [
        (
            number_text(summary.get("gap_closed"), ".1%"),
            f"of the held-out gap between {gap_start(summary)} and teacher closed",
        ),
        (number_text(last.get("loss"), ".3f"), f"held-out loss; teacher {loss}"),
        (number_text(last.get("top1"), ".1%"), "of likeliest tokens are the teacher's"),
    ]
    for key, text, where in (
        ("bytes", "smaller state than the teacher's", " at {:,} tokens"),
        ("decode_ms", "the teacher's speed", " at position {:,}"),
    ):
        if pairs := by_position(summary.get(key, {})):
            position, teacher, student = pairs[-1]
            found.append((ratio_text(teacher / student), text + where.format(position)))
        else:
            found.append((NOT_MEASURED, text))
    return html.figures(found)
