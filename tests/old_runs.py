"""Files that older code wrote (tests/contract/old_files), and whether a run ends as that code's did."""

import csv
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tolerances import SAME_END, TRAJECTORY_MAX, TRAJECTORY_MEAN, relative_error

from radlads.checkpoint.model_folder import load_model
from radlads.model.modeling import RadladsForCausalLM

FILES = Path(__file__).parent / "contract" / "old_files" / "5c9f070"


def copied(folder: Path) -> Path:
    """A copy of all files, to be the working directory: paths in them are relative."""
    return shutil.copytree(FILES, folder / "old")


def logits(model: RadladsForCausalLM, old: Path) -> torch.Tensor:
    """The model's for the tokens whose logits are stored."""
    tokens = load_file(old / "expected" / "logits.safetensors")["tokens"]
    with torch.inference_mode():
        return model(tokens).logits


def assert_ends_as_then(old: Path, name: str) -> None:
    """Compare the run that has gone on in old/unfinished with what the older code came to."""
    folder, expected = old / "unfinished" / name, load_file(old / "expected" / f"{name}.safetensors")
    guarded = ("usual_loss",) if name == "alone" else ()  # by train.spike_factor, whose state checkpoints hold
    assert_same_curves(folder / "metrics.csv", old / "expected" / f"{name}.csv", ("loss", "grad_norm", *guarded))
    if (heldout := old / "expected" / f"{name}-heldout.csv").is_file():
        assert_same_curves(folder / "heldout.csv", heldout, ("loss", "kl"))
    model = load_model(folder)
    assert relative_error(logits(model, old), expected.pop("logits")) < SAME_END
    found = {key: value.detach().flatten()[:: max(1, value.numel() // 16)] for key, value in model.named_parameters()}
    assert_same_weights(found, expected)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    moved = {name: (found[name] - tensor).abs().max().item() for name, tensor in expected.items()}
    assert max(moved.values()) < SAME_END, moved


def assert_same_curves(found: Path, expected: Path, columns: tuple[str, ...] = ("loss", "grad_norm")) -> None:
    """Compare columns of two CSV files, row by row, as far as runs whose sums are in another order agree."""
    rows, rows_then = (list(csv.DictReader(path.open(newline=""))) for path in (found, expected))
    for column in columns:
        drift = [abs(float(a[column]) / float(b[column]) - 1) for a, b in zip(rows, rows_then, strict=True)]
        assert drift and max(drift) < TRAJECTORY_MAX, (column, drift)
        assert sum(drift) / len(drift) < TRAJECTORY_MEAN, (column, drift)
