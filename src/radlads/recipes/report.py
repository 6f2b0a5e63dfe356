"""report.png: what happened in a conversion, from the files in its folders, at one glance."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from radlads.report.plots import STEPS, draw_alignment, draw_heldout, draw_training_loss
from radlads.report.run_folder import read_csv


def write_report(stage_folders: dict[str, Path], summary: dict[str, Any], path: Path) -> None:
    """Plot training loss per stage, alignment per layer, and the student's held-out loss against the teacher's."""
    rows = {stage: read_csv(folder / "metrics.csv") for stage, folder in stage_folders.items()}
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    training, alignment, heldout = figure.subplots(1, 3)
    draw_training_loss(training, rows)
    training.set(title="Training loss per stage", ylabel="loss (each stage's own)", yscale="log")
    training.legend()
    draw_alignment(alignment, rows["align"])
    alignment.set_title("Alignment per layer")
    draw_heldout(heldout, {step: summary[step]["loss"] for step in ("teacher", *STEPS) if step in summary})
    heldout.set_title("Held-out loss after each step")
    figure.savefig(path, dpi=110)
