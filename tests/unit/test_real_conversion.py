"""The real conversion's benchmark in small: every row, the files it leaves, and where it goes on; its text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from radlads.data.binidx import BinIdxReader

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import debian_text  # noqa: E402
import real_conversion  # noqa: E402
import real_text  # noqa: E402

ROWS = ["teacher", "window_untrained", "setup", "align", "distill", "extend"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the printed text of a whole tiny run."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, BENCHMARKS / "real_conversion.py", "--tiny", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_a_run_measures_every_row_on_both_kinds_of_text(finished):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    assert sorted(results["rows"]) == sorted(ROWS)
    for row in results["rows"].values():
        for kind in ("english", "python"):
            assert row[kind].keys() == {"loss", "kl", "top1", "num_tokens", "by_position"}
            assert [each["end"] for each in row[kind]["by_position"]] == [128, 256, 512, 1024]
        assert row["recall"].keys() == {"passkey", "needle"}
        assert row["ruler"].keys() == {"niah_single_1", "niah_multikey_2"}
        assert len(row["replies"]) == 10 and len(row["costs"]) == 2
    assert results["rows"]["teacher"]["english"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["rows"]["align"]["tokens"] == 2048
    (second,) = results["seeds"].values()
    assert second["english"]["kl"] != results["rows"]["extend"]["english"]["kl"]


@pytest.mark.slow
def test_it_prints_tables_and_both_replies_to_each_prompt(finished):
    _, said = finished
    assert [line.split()[0] for line in said.split("\nenglish ")[1].splitlines()[1:7]] == ROWS
    assert said.count("[teacher]") == said.count("[extend]") == 10


@pytest.mark.slow
def test_the_same_command_measures_nothing_twice(finished, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.setattr(real_conversion, "run_stage", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(real_conversion.real_measures, "ruler", lambda *_, **__: pytest.fail("asked again"))
    assert real_conversion.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert real_conversion.main(["--tiny", "--device", "cpu", "--out", str(out), "--align-tokens", "4096"]) == 2
    assert "holds a run of another plan" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_shows_the_run(finished):
    from radlads.cli import main

    out, _ = finished
    assert main(["report", str(out / "seed-1337")]) == 0
    assert "What is the capital of France?" in (out / "seed-1337" / "report.html").read_text()


def test_pages_lose_their_menus_and_other_languages_are_told_apart():
    page = (
        b"<html><head><title>no</title></head><body><nav>Menu</nav><p>The first line.</p><p>And the second.</p></body>"
    )
    assert debian_text.page_text(page) == "The first line.\nAnd the second.\n"
    assert debian_text.is_english("It is not the end of the story, and that is as it should be for all of us." * 20)
    assert not debian_text.is_english("Das ist nicht das Ende der Geschichte, und so soll es auch sein." * 20)


def test_documents_are_held_out_by_name_and_copies_of_them_left_out():
    texts = [f"line number {n} of this text\n" * 3 + f"and its own line {n} here\n" for n in range(200)]
    documents = [real_text.Document("package", str(n), text) for n, text in enumerate(texts)]
    (first, *_) = heldout = [each for each in documents if each.is_heldout]
    assert 1 <= len(heldout) <= 12
    copied = real_text.Document("other", next(str(n) for n in range(9) if not copy_of(first, n).is_heldout), first.text)
    kept = list(real_text.fresh([*documents, copied]))
    assert len(kept) == len(documents)
    assert copied not in kept


def copy_of(document, number):
    """The same text in another package under another name."""
    return real_text.Document("other", str(number), document.text)


def test_the_tiny_text_holds_both_kinds(tmp_path):
    _, data = real_text.write_tiny_text(tmp_path)
    for kind in ("english", "python"):
        assert BinIdxReader(data / f"{kind}-train").num_tokens > 40_000
        assert BinIdxReader(data / f"{kind}-heldout").num_tokens > 2 * 1025
