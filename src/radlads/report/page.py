"""`radlads report`: a run's folder as one page and its charts as PNG. Every number comes from a file in that folder."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from radlads.files import write_text
from radlads.report import html
from radlads.report.charts import Chart
from radlads.report.plots import STEPS, conversion_charts, layers_of, long_context_charts
from radlads.report.run_folder import EVALUATION, EXPORT, LONG_CONTEXT, Run, Stage, by_name, read_run
from radlads.report.wording import (
    NOT_MEASURED,
    NOT_RECORDED,
    bytes_in_words,
    chance_text,
    mixer_title,
    number_text,
    score_text,
)

PAGE = "report.html"
PLOTS = "plots"
_MODELS = ("teacher", "student")


def write_page(folder: Path) -> Path:
    """Write RUN/report.html and RUN/plots/*.png, and return the page's path. Raises ValueError as read_run."""
    run = read_run(folder)
    before = conversion_charts(
        by_stage(run, lambda stage: stage.metrics), by_stage(run, lambda stage: stage.heldout), heldout_losses(run)
    )
    after = long_context_charts(_models(run))
    plots = folder / PLOTS
    plots.mkdir(exist_ok=True)
    for chart in [*before, *after]:
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
    return [
        f"<header>\n<h1>{escape(_title(run))}</h1>",
        html.paragraph(_origin(run), "lead"),
        _headline(run) + "</header>",
        html.section("What was converted", html.facts(_conversion(run))),
        html.section("Recipe and budget", _recipe(run)),
        html.section("Training", *_with_gaps(html.charts(losses), _gaps_in_training(run))),
        html.section("Teacher and student on held-out text", _heldout(run, before)),
        html.section("Tasks", _tasks(run)),
        html.section("Loss by position", *_long_context(run, position, "loss"), _loss_note(run)),
        html.section("Facts in long texts", *_long_context(run, retrieval, "passkey", "needle"), _retrieval_note(run)),
        html.section("Speed and memory", *_costs(run), *_long_context(run, costs, "costs"), _costs_note(run)),
        html.section("Samples", _samples(run)),
        html.section("Loading the model", _loading(run)),
        html.section("Configuration and versions", _configuration(run)),
    ]


def _title(run: Run) -> str:
    return f"{_teacher_name(run)} as {_mixers(run.student)}"


def _origin(run: Run) -> str:
    stages = ", ".join(stage.folder.name for stage in run.stages)
    version = _versions(run).get("radlads", f"(version {NOT_RECORDED})")
    return f"A conversion by radlads {version}. Stages: {stages}."


def _teacher_name(run: Run) -> str:
    """The folder or hub name of the teacher, as the first stage's configuration has it."""
    teacher = run.stages[0].config.get("train", {}).get("teacher", {})
    name = teacher.get("path") or teacher.get("hf_path") or "teacher"
    return Path(name).name or name


def _mixers(model: Mapping[str, Any]) -> str:
    counts = Counter(model.get("time_mixers", ()))
    if len(counts) == 1:
        return mixer_title(next(iter(counts)))
    return " + ".join(f"{count} × {mixer_title(name)}" for name, count in counts.items()) or "student"


def _headline(run: Run) -> str:
    """The figures that a reader asks for first."""
    summary = run.summary
    if summary is None:
        return html.missing(what="teacher and student on the same text")
    last = summary.get(next((step for step in ("retied", *reversed(STEPS)) if step in summary), ""), {})
    loss = number_text(summary.get("teacher", {}).get("loss"), ".3f")
    found = [
        (number_text(summary.get("gap_closed"), ".1%"), "of the held-out gap between setup and teacher closed"),
        (number_text(last.get("loss"), ".3f"), f"held-out loss; teacher {loss}"),
        (number_text(last.get("top1"), ".1%"), "of likeliest tokens are the teacher's"),
    ]
    for key, text, where in (
        ("bytes", "smaller state than the teacher's", " at {:,} tokens"),
        ("decode_ms", "the teacher's speed", " at position {:,}"),
    ):
        if pairs := _pairs(summary.get(key, {})):
            position, teacher, student = pairs[-1]
            found.append((_times(teacher / student), text + where.format(position)))
        else:
            found.append((NOT_MEASURED, text))
    return html.figures(found)


def _conversion(run: Run) -> dict[str, str]:
    model, teacher = run.student, run.stages[0].config.get("train", {}).get("teacher", {})
    variant = "group norm" if model.get("groupnorm_att") else "balanced" if model.get("balance_state") else ""
    vocabulary = model.get("vocab_size")
    return {
        "Teacher": str(teacher.get("path") or teacher.get("hf_path") or ""),
        "Student": f"{_mixers(model)}{f', {variant}' if variant else ''}",
        "Layers": _filled("{} of width {}", model, "num_hidden_layers", "hidden_size"),
        "Heads": _filled(
            "{} of size {}, {} of keys and values", model, "num_attention_heads", "head_dim", "num_key_value_heads"
        ),
        "Parameters": f"{run.num_parameters:,}" if run.num_parameters else NOT_MEASURED,
        "Vocabulary": "" if vocabulary is None else f"{vocabulary:,} tokens",
        "Started from": str(run.stages[0].manifest.get("parent", "")),
        "Training text": str(run.stages[0].config.get("train", {}).get("data_file", "")),
    }


def _filled(text: str, values: Mapping[str, Any], *keys: str) -> str:
    """The text with these values in it, nothing if one is not there."""
    found = [values.get(key) for key in keys]
    return "" if None in found else text.format(*found)


def _recipe(run: Run) -> str:
    head = ["stage", "tokens", "minutes", "tokens/s", "context", "batch", "learning rate", "loss", "precision"]
    tokens, seconds = (_sum(stage.manifest.get(key) for stage in run.stages) for key in ("tokens", "seconds"))
    minutes = None if seconds is None else seconds / 60
    memory = number_text((run.summary or {}).get("peak_rss_gb"), ".1f")
    total = (
        f"Tokens: {number_text(tokens, ',')}; minutes of training, held-out measurements included: "
        f"{number_text(minutes, '.1f')}; GB of main memory at most: {memory}."
    )
    return html.table(head, map(_recipe_row, run.stages)) + html.paragraph(total, "note")


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one is not there: what is left out would make a total that is none."""
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _loss(stage: str, train: dict[str, Any]) -> str:
    """What a stage minimised; weights belong to extend with a teacher alone."""
    teacher = train.get("teacher", {})
    if stage == "align":
        return str(train.get("align_loss", NOT_RECORDED))
    if stage == "distill":
        return "KL"
    if not (teacher.get("path") or teacher.get("hf_path")):
        return "CE"
    weights = {"KL": teacher.get("kl_weight"), "CE": teacher.get("ce_weight")}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight) or NOT_RECORDED


def _recipe_row(stage: Stage) -> list[str]:
    train, model = stage.config.get("train", {}), stage.config.get("model", {})
    tokens, seconds = stage.manifest.get("tokens"), stage.manifest.get("seconds")
    batch = stage.manifest.get("sequences_per_step")
    if batch is None and train.get("devices", 1) == train.get("num_nodes", 1) == 1:  # of runs that did not say so
        batch = train.get("micro_bsz", 0) * train.get("accumulate_grad_batches", 1)
    return [
        stage.name,
        number_text(tokens, ","),
        number_text(seconds and seconds / 60, ".1f"),
        number_text(tokens and seconds and tokens / seconds, ",.0f"),
        f"{model['ctx_len']:,}" if "ctx_len" in model else NOT_RECORDED,
        f"{batch:,}" if batch else NOT_RECORDED,
        _filled("{:g} to {:g}", train, "lr_init", "lr_final") or NOT_RECORDED,
        _loss(stage.name, train),
        str(train.get("precision", NOT_RECORDED)),
    ]


def _gaps_in_training(run: Run) -> list[str]:
    """The charts of the training that a stage has no rows for."""
    gaps = []
    for name, stage in by_name(run.stages).items():
        if not any("loss" in row for row in stage.metrics):
            gaps.append(f"{name}: training loss")
        if stage.name == "align" and not layers_of(stage.metrics):
            gaps.append(f"{name}: alignment by layer")
        if not any("loss" in row for row in stage.heldout):
            gaps.append(f"{name}: held-out loss while training")
    return gaps


def _with_gaps(charts: str, gaps: Iterable[str]) -> list[str]:
    """Charts and what is missing beside them; a single sentence where there are none."""
    return [charts, *(html.missing(what=gap) for gap in gaps)] if charts else [html.missing()]


def _long_context(run: Run, drawn: Sequence[Chart], *parts: str) -> list[str]:
    """The charts of parts of radlads longcontext, and which part of which model is missing."""
    if not drawn:
        what = "by length" if parts == ("costs",) else ""
        return [html.missing(_long_context_command(run), what=what)]
    models = _models(run)
    gaps = [f"{part} of the {name}" for part in parts for name in _MODELS if not models.get(name, {}).get(part)]
    if parts == ("costs",) and not any(each.name == "cost-peak-bytes" for each in drawn):
        gaps.append("peak memory by length, which only CUDA tells")
    return _with_gaps(html.charts(drawn), gaps)


def _heldout(run: Run, before: Sequence[Chart]) -> str:
    if run.summary is None:
        if not any(_has_heldout(stage) for stage in run.stages):
            return html.missing()
        rows = [
            [name, *_measured(stage.manifest["heldout"] if _has_heldout(stage) else {})]
            for name, stage in by_name(run.stages).items()
        ]
        note = "Each stage's own held-out windows: their lengths may differ from stage to stage."
        return html.table(["after", "loss", "KL", "top-1"], rows) + html.paragraph(note, "note")
    steps = ("teacher", *STEPS, *(["retied"] if "retied" in run.summary else []))
    rows = [[step, *_measured(run.summary.get(step, {}))] for step in steps]
    note = (
        "Loss and KL in nats per token; top-1: how often the likeliest token is the teacher's. setup: the teacher's "
        "weights copied, nothing trained. The share of the gap closed is (setup − extend) / (setup − teacher) in loss."
    )
    left = html.table(["", "loss", "KL", "top-1"], rows) + html.paragraph(note, "note")
    return html.columns(left, html.charts(chart for chart in before if chart.name == "heldout") or html.missing())


def _has_heldout(stage: Stage) -> bool:
    return isinstance(stage.manifest.get("heldout"), dict)


def _measured(values: Mapping[str, Any]) -> list[str]:
    return [number_text(values.get(key), form) for key, form in (("loss", ".4f"), ("kl", ".4f"), ("top1", ".1%"))]


def _tasks(run: Run) -> str:
    """radlads eval's table, a row for each task and metric, a column for each model."""
    scores = (run.evaluation or {}).get("scores")
    if not scores:
        words = ["eval", *map(str, _model_folders(run)), "--teacher", _teacher_path(run), "--baselines"]
        return html.missing(_command(*words, "--tasks", "paper", "--output", str(run.folder / EVALUATION)))
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


def _loss_note(run: Run) -> str:
    models = _models(run)
    if not any(model.get("loss") for model in models.values()):
        return ""
    text = (run.long_context or {})["settings"]["text"]
    bins = next(model["loss"] for model in models.values() if model.get("loss"))
    tokens = sum(each["num_tokens"] for each in bins)
    return html.paragraph(f"{tokens:,} tokens of {text}, windows of {bins[-1]['end']:,}.", "note")


def _retrieval_note(run: Run) -> str:
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


def _costs(run: Run) -> list[str]:
    """State and decoding time at a few positions, as summary.json has them."""
    summary = run.summary or {}
    states, speeds = _pairs(summary.get("bytes", {})), _pairs(summary.get("decode_ms", {}))
    rows = [
        [f"state at {tokens:,} tokens", bytes_in_words(teacher), bytes_in_words(student), _times(teacher / student)]
        for tokens, teacher, student in states
    ]
    rows += [
        [f"token at position {tokens:,}", f"{teacher:.2f} ms", f"{student:.2f} ms", _times(teacher / student)]
        for tokens, teacher, student in speeds
    ]
    gaps = [] if states else [html.missing(what="state of teacher and student at a few lengths")]
    gaps += [] if speeds else [html.missing(what="time of a token of teacher and student at a few positions")]
    if not rows:
        return gaps
    note = (
        "One sequence. State: computed from the model's sizes, keys and values in bf16, recurrent states in fp32. "
        "× is the teacher's over the student's."
    )
    return [html.table(["", "teacher", "student", "×"], rows), html.paragraph(note, "note"), *gaps]


def _costs_note(run: Run) -> str:
    if not any(model.get("costs") for model in _models(run).values()):
        return ""
    settings = (run.long_context or {})["settings"]
    return html.paragraph(
        f"Charts: one sequence, {settings['dtype']}, {settings['device']}. State: the bytes of what a model's cache "
        "holds after reading. Peak memory: the most that was allocated while reading and generating, beside the "
        "weights.",
        "note",
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _pairs(values: Mapping[str, Mapping[str, float]]) -> list[tuple[int, float, float]]:
    """(position, teacher's, student's) of what summary.json holds by model and position."""
    teacher, student = (values.get(name, {}) for name in _MODELS)
    return [(int(position), teacher[position], student[position]) for position in student if position in teacher]


def _samples(run: Run) -> str:
    sample = (run.summary or {}).get("sample")
    if not sample:
        return html.missing()
    texts = [html.heading(f"The {name}") + html.code(sample.get(name, NOT_MEASURED)) for name in _MODELS]
    return html.paragraph("Both continue the same prompt, drawing with the same seed:") + (
        html.code(sample["prompt"]) + html.columns(*texts)
    )


def _loading(run: Run) -> str:
    if run.export is None:
        folder = run.stages[-1].folder
        lines = "from pathlib import Path\n\nfrom radlads.checkpoint.model_folder import load_model\n\n"
        return html.paragraph("There is no export in this run; a stage's folder loads with radlads:") + html.code(
            f"{lines}model = load_model(Path({str(folder)!r}))"
        )
    name = str(run.export)
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)"
    )
    parts = [html.paragraph("With transformers alone, or on the command line:"), html.code(lines)]
    parts.append(html.code(f"radlads generate {shlex.quote(name)} --prompt 'Once upon a time'"))
    difference = number_text((run.summary or {}).get("reload_max_abs_diff"), ".1e")
    text = "Largest difference of its logits from the student's, reloaded in a process without radlads"
    parts.append(html.paragraph(f"{text}: {difference}.", "note"))
    return "\n".join(parts)


def _configuration(run: Run) -> str:
    versions = html.facts({name: str(version) for name, version in _versions(run).items()})
    recipes = [html.folded(f"{stage.folder.name}/config.yaml", stage.recipe or NOT_RECORDED) for stage in run.stages]
    hashes = {
        f"{stage.folder.name}/{name}": f"sha256 {digest}"
        for stage in run.stages
        for name, digest in stage.manifest.get("sha256", {}).items()
        if name.endswith(".safetensors")
    }
    return "\n".join([versions, *recipes, html.heading("Weights"), html.facts(hashes)])


def _versions(run: Run) -> Mapping[str, Any]:
    versions: Mapping[str, Any] = run.stages[-1].manifest.get("versions", {})
    return versions


def _models(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """What radlads longcontext measured, teacher first."""
    models = (run.long_context or {}).get("models", {})
    return {name: models[name] for name in _MODELS if name in models}


def _teacher_path(run: Run) -> str:
    teacher = run.stages[0].config.get("train", {}).get("teacher", {})
    return str(teacher.get("path") or teacher.get("hf_path") or "TEACHER")


def _model_folders(run: Run) -> list[Path]:
    """The stages, and the export in place of the last one."""
    folders = [stage.folder for stage in run.stages]
    return folders if run.export is None else [*folders[:-1], run.folder / EXPORT]


def _long_context_command(run: Run) -> str:
    words = ["longcontext", str(_model_folders(run)[-1]), "--teacher", _teacher_path(run)]
    return _command(*words, "--out", str(run.folder / LONG_CONTEXT.parent))


def _command(*words: str) -> str:
    """A radlads command, each option on a line of its own."""
    return shlex.join(["radlads", *words]).replace(" --", " \\\n    --")
