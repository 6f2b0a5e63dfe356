"""Which layers are worth keeping as softmax: the page's section and chart of what radlads select found."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from radlads.report import html
from radlads.report.charts import COLOURS, Chart
from radlads.report.run_folder import Run

TITLES = {
    "kl": "KL to the teacher",
    "recalled": "KL where recalled",
    "needle": "needles found",
    "answer_loss": "loss of answers",
}
"""Names of what is measured, for people."""


def selection_charts(record: Mapping[str, Any] | None) -> list[Chart]:
    """What decided over the number of layers kept, as layers.json has it: chosen one by one, and at equal distances."""
    if record is None:
        return []
    by = record["by"]
    draw = partial(draw_selection, curve=record["curve"], uniform=record["uniform"], by=by)
    return [Chart("softmax-layers", f"{TITLES[by]} by layers kept as softmax", draw, 2.6)]


def draw_selection(
    axes: Axes, curve: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]], by: str
) -> None:
    """Two lines, each point a student without further training."""
    rows = {"chosen": (curve, "student"), "uniform spacing": ([curve[0], *uniform], "setup")}
    for name, (points, colour) in rows.items():
        numbers, values = [len(row["layers"]) for row in points], [row[by] for row in points]
        style = "-" if name == "chosen" else "--"
        axes.plot(numbers, values, style, marker="o", ms=4, color=COLOURS[colour], label=name)
    axes.set(xlabel="layers kept as softmax", ylabel="share" if by == "needle" else "nats per token", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def softmax_layers(run: Run) -> list[str]:
    """The section's parts; nothing where no layers were selected."""
    record = run.selection
    if record is None:
        return []
    by, first = record["by"], record["rounds"][0]["values"]
    names = [name for name in TITLES if name in record["curve"][0]]
    ranked = sorted(first, key=lambda layer: -first[layer][by] if by == "needle" else first[layer][by])
    singles = [[layer, *_cells(first[layer], names)] for layer in ranked]
    kept = [_row(each, "chosen", names) for each in record["curve"]]
    kept += [_row(each, "uniform spacing", names) for each in record["uniform"]]
    head = [TITLES[name] for name in names]
    left = html.heading("Layers kept together") + html.table(["layers", "found by", "kept", *head], kept)
    right = html.heading("One layer at a time") + html.table(["layer", *head], singles)
    kept_layers = [layer for layer, kind in enumerate(run.student.get("layer_types", ())) if kind == "full_attention"]
    note = (
        f"Softmax layers of this run's student: {_listed(kept_layers)}. The teacher's attention was put back into the "
        "student that was measured, layer by layer, and nothing was trained: what training makes of it is told "
        f"elsewhere. Chosen by: {TITLES[by]}. Measured on {record['text']}."
    )
    return [html.charts(selection_charts(record)), left, right, html.paragraph(note, "note")]


def _row(measured: Mapping[str, Any], found_by: str, names: Sequence[str]) -> list[str]:
    layers = measured["layers"]
    return [_listed(layers), found_by, str(len(layers)), *_cells(measured, names)]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _cells(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:.1%}" if name == "needle" else f"{values[name]:.4f}" for name in names]
