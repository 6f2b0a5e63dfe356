"""report.png: what happened in a conversion, from the files in its folders."""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"align": "#4c72b0", "distill": "#dd8452", "extend": "#55a868"}


def write_report(stage_folders: dict[str, Path], summary: dict[str, Any], path: Path) -> None:
    """Plot training loss per stage, alignment per layer, and the student's held-out loss against the teacher's."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    _training_loss(axes[0], stage_folders)
    _alignment(axes[1], stage_folders["align"])
    _heldout(axes[2], summary)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's metrics.csv, empty cells left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _training_loss(axes, stage_folders: dict[str, Path]) -> None:
    for stage, folder in stage_folders.items():
        rows = [row for row in read_metrics(folder) if "loss" in row]
        tokens = [row["tokens"] / 1e6 for row in rows]
        axes.plot(tokens, [row["loss"] for row in rows], label=stage, color=_COLOURS[stage])
    axes.set(title="Training loss per stage", xlabel="million tokens", ylabel="loss (each stage's own)", yscale="log")
    axes.legend()


def _alignment(axes, folder: Path) -> None:
    rows = [row for row in read_metrics(folder) if "loss" in row]
    layers = sorted({key for row in rows for key in row if key.startswith("layer_")}, key=lambda key: int(key[6:]))
    for number, layer in enumerate(layers):
        shade = plt.get_cmap("viridis")(number / max(1, len(layers) - 1))
        points = [(row["tokens"] / 1e6, row[layer]) for row in rows if layer in row]
        axes.plot(*zip(*points, strict=True), label=layer.replace("_", " "), color=shade)
    axes.set(title="Alignment per layer", xlabel="million tokens", ylabel="distance to the teacher's attention")
    if len(layers) <= 12:
        axes.legend()


def _heldout(axes, summary: dict[str, Any]) -> None:
    steps = ["setup", *_COLOURS]
    bars = axes.bar(steps, [summary[step]["loss"] for step in steps], color=["#999999", *_COLOURS.values()])
    axes.bar_label(bars, fmt="%.3f")
    axes.axhline(
        summary["teacher"]["loss"], color="black", linestyle="--", label=f"teacher {summary['teacher']['loss']:.3f}"
    )
    axes.set(title="Held-out loss after each step", ylabel="nats per token")
    axes.legend()
