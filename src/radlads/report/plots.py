"""What is drawn of a run: each function draws plain rows, as its files have them, into axes."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from radlads.report.charts import COLOURS, Chart
from radlads.report.wording import bytes_in_words

Row = Mapping[str, Any]
STEPS = ("setup", "align", "distill", "extend", "instruct")
_MANY_LAYERS = 12
_FEW_ROWS = 12


def conversion_charts(
    stages: Mapping[str, Sequence[Row]],
    heldout_rows: Mapping[str, Sequence[Row]],
    heldout_losses: Mapping[str, float],
) -> list[Chart]:
    """Training loss of every stage, alignment by layer, held-out loss while training and after every step; those there
    are rows for.

    stages, heldout_rows: rows of metrics.csv and heldout.csv by stage. heldout_losses: nats per token by step, and of
    the teacher.
    """
    charts = [
        Chart(
            f"loss-{stage.replace(' ', '-')}",
            f"{stage}: training loss",
            partial(draw_training_loss, stages={stage: rows}),
            2.4,
        )
        for stage, rows in stages.items()
        if _points(rows, "loss")
    ]
    if layers_of(stages.get("align", ())):
        charts.append(Chart("alignment", "Alignment by layer", partial(draw_alignment, rows=stages["align"])))
    if any(_points(rows, "loss") for rows in heldout_rows.values()):
        draw = partial(draw_heldout_course, stages=heldout_rows)
        charts.append(Chart("heldout-course", "Held-out loss while training, each stage on its own windows", draw))
    if len(heldout_losses) > 1:
        draw = partial(draw_heldout, losses=heldout_losses)
        charts.append(Chart("heldout", "Held-out loss after each step", draw))
    return charts


def long_context_charts(models: Mapping[str, Row]) -> list[Chart]:
    """Heat maps of retrieval, loss by position, and costs by length, of what radlads longcontext measured."""
    charts = [
        Chart(
            f"{task}-{name}", f"{task}: right answers of the {name}, %", partial(draw_retrieval, cells=model[task]), 2.5
        )
        for task in ("passkey", "needle")
        for name, model in models.items()
        if model.get(task)
    ]
    if losses := {name: model["loss"] for name, model in models.items() if model.get("loss")}:
        charts.append(Chart("loss-by-position", "Loss by position", partial(draw_loss_by_position, losses=losses)))
    if costs := {name: model["costs"] for name, model in models.items() if model.get("costs")}:
        charts += [
            Chart(f"cost-{key.replace('_', '-')}", title, partial(draw_cost, costs=costs, key=key, unit=unit), 2.6)
            for key, title, unit in (
                ("prefill_tokens_per_s", "Reading a prompt", "tokens per second"),
                ("decode_ms", "Generating after it", "ms per token"),
                ("state_bytes", "State of one sequence: what its cache holds", "bytes"),
                ("peak_bytes", "Peak memory beside the weights, measured", "bytes"),
            )
            if _rows_with(costs, key)
        ]
    return charts


def draw_training_loss(axes: Axes, stages: Mapping[str, Sequence[Row]]) -> None:
    """Loss over tokens of one stage or several."""
    for stage, rows in stages.items():
        axes.plot(*_points(rows, "loss"), label=stage, color=COLOURS[stage.split()[0]], marker=_marker(rows), ms=3)
    axes.set(xlabel="tokens", ylabel="loss")
    _count_tokens(axes)


def draw_alignment(axes: Axes, rows: Sequence[Row]) -> None:
    """Each layer's distance to the attention it replaces, over tokens."""
    layers = layers_of(rows)
    for number, layer in enumerate(layers):
        shade = matplotlib.colormaps["viridis"](0.3 + 0.5 * number / max(1, len(layers) - 1))
        is_named = len(layers) <= _MANY_LAYERS or number in (0, len(layers) // 2, len(layers) - 1)
        label = layer.replace("_", " ") if is_named else None
        axes.plot(*_points(rows, layer), label=label, color=shade, marker=_marker(rows), ms=3)
    axes.set(xlabel="tokens", ylabel="distance to the attention", ylim=(0, None))
    _count_tokens(axes)
    axes.legend(fontsize="small", ncols=2)


def draw_heldout_course(axes: Axes, stages: Mapping[str, Sequence[Row]]) -> None:
    """Held-out loss over the tokens of all stages, one after the other."""
    before = 0.0
    for stage, rows in stages.items():
        if points := _points(rows, "loss"):
            tokens = [before + each for each in points[0]]
            axes.plot(tokens, points[1], label=stage, color=COLOURS[stage.split()[0]], marker=_marker(rows), ms=3)
            before = tokens[-1]
    axes.set(xlabel="tokens", ylabel="nats per token")
    _count_tokens(axes)
    axes.legend()


def draw_heldout(axes: Axes, losses: Mapping[str, float]) -> None:
    """A bar for every step, and the teacher's loss as a line."""
    steps = [step for step in STEPS if step in losses]
    bars = axes.bar(steps, [losses[step] for step in steps], color=[COLOURS[step] for step in steps], width=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=2)
    axes.set(ylabel="nats per token", ylim=(0, 1.15 * max(losses.values())))
    axes.grid(visible=False, axis="x")
    if "teacher" in losses:
        axes.axhline(losses["teacher"], color=COLOURS["teacher"], linestyle="--")
        axes.set_xlim(-0.5, len(steps) + 0.35)
        text = f"teacher\n{losses['teacher']:.3f}"
        axes.text(len(steps) + 0.3, losses["teacher"], text, color=COLOURS["teacher"], ha="right", va="bottom")


def draw_retrieval(axes: Axes, cells: Sequence[Row]) -> None:
    """A cell for every length and depth, its share of right answers in percent."""
    lengths = sorted({cell["length_tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    shares = {(cell["depth"], cell["length_tokens"]): cell["num_right"] / cell["num_samples"] for cell in cells}
    grid = [[shares.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    axes.pcolormesh(grid, vmin=0, vmax=1, cmap="viridis", edgecolors="face")
    for row, values in enumerate(grid):
        for column, share in enumerate(values):
            ink = "#fffffe" if share < 0.6 else "#000001"
            axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", color=ink, ha="center", va="center")
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the fact, %")
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [_count(length) for length in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{100 * depth:.0f}" for depth in depths])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)


def draw_loss_by_position(axes: Axes, losses: Mapping[str, Sequence[Row]]) -> None:
    """A model's loss in bins of positions, each from its first position to its end."""
    for name, bins in losses.items():
        edges = [max(1, bins[0]["first"]), *(each["end"] for each in bins)]
        axes.stairs([each["loss"] for each in bins], edges, baseline=None, color=COLOURS[name], label=name, lw=1.8)
    axes.set(xlabel="position in the text, tokens", ylabel="nats per token", xscale="log")
    _doublings(axes, [each["end"] for bins in losses.values() for each in bins])
    axes.legend()


def draw_cost(axes: Axes, costs: Mapping[str, Sequence[Row]], key: str, unit: str) -> None:
    """One cost of a context over its length, of the models that have it."""
    costs = _rows_with(costs, key)
    for name, rows in costs.items():
        lengths = [row["context_tokens"] for row in rows]
        axes.plot(lengths, [row[key] for row in rows], marker="o", ms=4, color=COLOURS[name], label=name)
    axes.set(xlabel="tokens of context", ylabel=unit, xscale="log")
    _doublings(axes, [row["context_tokens"] for rows in costs.values() for row in rows])
    if unit == "bytes":
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(value)))
        axes.set_ylabel("")
    else:
        axes.set_ylim(0, 1.1 * max(row[key] for rows in costs.values() for row in rows))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.legend()


def _rows_with(costs: Mapping[str, Sequence[Row]], key: str) -> dict[str, list[Row]]:
    """Rows that have a value, by model; models without any are left out."""
    found = {name: [row for row in rows if row.get(key) is not None] for name, rows in costs.items()}
    return {name: rows for name, rows in found.items() if rows}


def layers_of(rows: Sequence[Row]) -> list[str]:
    """The columns layer_0, layer_1, ... that metrics.csv has."""
    return sorted({key for row in rows for key in row if key.startswith("layer_")}, key=lambda key: int(key[6:]))


def _points(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]] | tuple[()]:
    """Tokens and a column's values, of the rows that have both; nothing if none has."""
    points = [(row["tokens"], row[column]) for row in rows if column in row and "tokens" in row]
    return ([x for x, _ in points], [y for _, y in points]) if points else ()


def _marker(rows: Sequence[Row]) -> str:
    """Dots where there are so few points that a line hides how few."""
    return "o" if len(rows) <= _FEW_ROWS else ""


def _count_tokens(axes: Axes) -> None:
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _decimal(value)))


def _doublings(axes: Axes, lengths: Iterable[int]) -> None:
    """Ticks at the lengths, every other one where there are many."""
    ticks = sorted(set(lengths))
    every = -(-len(ticks) // 7)
    axes.set_xticks(ticks[::-1][::every], [_count(tick) for tick in ticks[::-1][::every]])
    axes.xaxis.set_minor_locator(NullLocator())


def _count(tokens: float) -> str:
    """8192 as 8k; numbers that are no multiples of 1024 as they are."""
    return f"{tokens / 1024:,.0f}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,.0f}"


def _decimal(tokens: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"
