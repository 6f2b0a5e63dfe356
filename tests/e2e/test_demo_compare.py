"""`radlads demo --compare`: the window's student, the paper's, and one with a kept layer, at equal tokens."""

import contextlib
import io
import json

import pytest

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main

SMALL = ["--set", "model.ctx_len=32", "--set", "train.micro_bsz=4", "--set", "train.heldout_every_steps=0"]
SMALL += [
    "--set",
    "train.heldout_tokens=640",
    "--set",
    "model.mixer.window_tokens=8",
    "--set",
    "train.log_every_n_steps=1",
]
TOKENS = 640
STAGES = ("align", "distill", "extend")


@pytest.fixture(scope="module")
def compared(teacher, corpus_folder, tmp_path_factory):
    """Its folder, and what it printed."""
    out = tmp_path_factory.mktemp("compared") / "run"
    data = ["--data", corpus_folder / "train", "--heldout-data", corpus_folder / "heldout"]
    words = ["demo", "--teacher", teacher, *data, "--out", out, "--compare", *SMALL]
    words += ["--set", f"train.my_exit_tokens={TOKENS}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in words]) == 0
    return out, printed.getvalue()


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_all_three_have_trained_on_as_many_tokens(compared):
    out, _ = compared
    for folder in (out, out / "compare/paper", out / "compare/kept"):
        assert [summary(folder)[stage]["tokens"] for stage in STAGES] == [TOKENS] * 3


def test_each_is_the_student_that_it_is_called(compared):
    out, _ = compared
    window, paper, kept = (
        load_model(folder / "hf").config for folder in (out, out / "compare/paper", out / "compare/kept")
    )
    assert window.mixer_settings["rad_rwkv7"]["window_tokens"] == kept.mixer_settings["rad_rwkv7"]["window_tokens"] == 8
    assert not paper.mixer_settings
    assert [len(each.recurrent_layers) for each in (window, paper, kept)] == [3, 3, 2]


def test_the_window_has_rows_of_its_own(compared):
    out, printed = compared
    found = summary(out)
    gap = found["setup_without_window"]["loss"] - found["teacher"]["loss"]
    assert found["gap_closed"] == pytest.approx((found["setup_without_window"]["loss"] - found["extend"]["loss"]) / gap)
    assert found["teacher_window_untrained"]["kl"] != found["setup"]["kl"] != found["setup_without_window"]["kl"]
    assert "setup_without_window" not in summary(out / "compare/paper")
    assert "setup without window" in printed


def test_the_table_has_each_ones_figures(compared):
    out, printed = compared
    rows = printed.partition("at equal tokens")[2].splitlines()[1:4]
    for row, folder in zip(rows, (out, out / "compare/paper", out / "compare/kept"), strict=True):
        assert f"{summary(folder)['extend']['kl']:.4f}" in row
