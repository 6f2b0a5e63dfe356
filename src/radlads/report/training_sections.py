"""The page's sections on the conversion itself: models, recipe, training, and held-out text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from radlads.report import html
from radlads.report.charts import Chart
from radlads.report.plots import STEPS, layers_of
from radlads.report.run_facts import mixers
from radlads.report.run_folder import Run, Stage, by_name
from radlads.report.wording import HELDOUT_ROWS, NOT_MEASURED, NOT_RECORDED, heldout_title, number_text


def conversion(run: Run) -> dict[str, str]:
    """What was converted into what, by name."""
    model, teacher = run.student, run.stages[0].config.get("train", {}).get("teacher", {})
    variant = "group norm" if model.get("groupnorm_att") else "balanced" if model.get("balance_state") else ""
    vocabulary = model.get("vocab_size")
    return {
        "Teacher": str(teacher.get("path") or teacher.get("hf_path") or ""),
        "Student": f"{mixers(model)}{f', {variant}' if variant else ''}",
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


def recipe(run: Run) -> str:
    """A row for each stage, and the whole budget."""
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


def gaps_in_training(run: Run) -> list[str]:
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


def heldout(run: Run, before: Sequence[Chart]) -> str:
    """Losses on held-out text: after each step where a summary has them, else each stage's own."""
    if run.summary is None:
        if not any(_has_heldout(stage) for stage in run.stages):
            return html.missing()
        rows = [
            [name, *_measured(stage.manifest["heldout"] if _has_heldout(stage) else {})]
            for name, stage in by_name(run.stages).items()
        ]
        note = "Each stage's own held-out windows: their lengths may differ from stage to stage."
        return html.table(["after", "loss", "KL", "top-1"], rows) + html.paragraph(note, "note")
    steps = [step for step in HELDOUT_ROWS if step in run.summary or step in ("teacher", *STEPS[:-1])]
    rows = [[heldout_title(step, run.summary.get(step, {})), *_measured(run.summary.get(step, {}))] for step in steps]
    note = (
        "Loss and KL in nats per token; top-1: how often the likeliest token is the teacher's. setup: the teacher's "
        "weights copied, nothing trained. teacher, window: the untrained teacher, whose tokens see only as far as the "
        "student's window (64 + 4 if it has none). The share of the gap closed is (setup − extend) / (setup − teacher) "
        "in loss, where setup has no window."
    )
    left = html.table(["", "loss", "KL", "top-1"], rows) + html.paragraph(note, "note")
    return html.columns(left, html.charts(chart for chart in before if chart.name == "heldout") or html.missing())


def _has_heldout(stage: Stage) -> bool:
    return isinstance(stage.manifest.get("heldout"), dict)


def _measured(values: Mapping[str, Any]) -> list[str]:
    return [number_text(values.get(key), form) for key, form in (("loss", ".4f"), ("kl", ".4f"), ("top1", ".1%"))]
