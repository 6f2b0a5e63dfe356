"""The benchmark of talking in small: every row with every figure, equal tokens, and nothing measured twice."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import talks  # noqa: E402
import talks_measures  # noqa: E402
import talks_prompts  # noqa: E402

from radlads.inference.writing.own_prompts import own_prompts  # noqa: E402

ROWS = ["teacher", "extend", "instruct_off_policy", "instruct_on_policy"]
FIGURES = {"on_policy_kl", "on_policy_kl_reverse", "loops", "endless", "followed", "kl_plain"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the printed text of a whole tiny run."""
    out = tmp_path_factory.mktemp("talks") / "out"
    command = [sys.executable, BENCHMARKS / "talks.py", "--tiny", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


FOLLOWED = {
    "capitals": ("THE SEA IS DEEP.", "The sea is deep."),
    "json": ('```json\n{"%s": 1, "%s": "x"}\n```', '{"%s": 1}'),
    "sum": ("The sum is %s.", "It is 1000."),
    "copied": ("Here: %s", "Here: apple"),
}


def test_instructions_are_checked_by_what_they_ask_for():
    prompts = talks_prompts.asked(40)
    assert [each.prompt for each in prompts] == [each.prompt for each in talks_prompts.asked(40)]
    assert len({each.kind for each in prompts}) == 8
    of = {each.kind: each for each in prompts[:8]}
    numbers = [int(word) for word in re.findall(r"\d+", of["sum"].prompt)]
    filled = {
        "json": tuple(re.findall(r'"(\w+)"', of["json"].prompt)),
        "sum": (str(sum(numbers)),),
        "copied": (of["copied"].prompt.partition(": ")[2],),
    }
    for kind, (right, wrong) in FOLLOWED.items():
        values = filled.get(kind, ())
        assert of[kind].is_followed(right % values if values else right), kind
        assert not of[kind].is_followed(wrong % values[:1] if "%" in wrong else wrong), kind
    assert of["items"].is_followed("\n".join("abcdefgh"[: int(re.findall(r"\d", of["items"].prompt)[0])]))
    word = of["forbidden"].prompt.split("'")[1]
    assert of["forbidden"].is_followed("Nothing here.") and not of["forbidden"].is_followed(f"So {word} it is.")
    assert of["begun"].is_followed(of["begun"].prompt.split("'")[1] + ", so it is.")
    numbers = sorted(int(word) for word in re.findall(r"\d+", of["sorted"].prompt))
    assert of["sorted"].is_followed(", ".join(map(str, numbers)))
    assert not of["sorted"].is_followed(", ".join(map(str, numbers[::-1])))


def test_no_prompt_that_is_measured_is_trained_on():
    assert not {each.prompt for each in talks_prompts.asked(300)} & set(own_prompts())


def test_a_loop_is_what_repeats_at_the_end():
    assert talks_measures.loops([1, 2, 3] * 20) and talks_measures.loops([*range(100), *[7] * 48])
    assert not talks_measures.loops([1, 2, 3] * 15) and not talks_measures.loops([*[7] * 48, 1])
    assert not talks_measures.loops(list(range(48)))


@pytest.mark.slow
def test_a_run_measures_every_row_of_two_seeds(finished):
    out, said = finished
    rows = json.loads((out / "talks.json").read_text())
    assert list(rows) == ROWS
    for row, values in rows.items():
        assert values.keys() == FIGURES | {"seeds"}
        assert list(values["seeds"]) == ["1337", "1338"]
        assert all(held.keys() == FIGURES for held in values["seeds"].values())
        means = sum(held["kl_plain"] for held in values["seeds"].values()) / 2
        assert values["kl_plain"] == pytest.approx(means)
        assert (values["kl_plain"] < 1e-6) == (values["on_policy_kl"] < 1e-6) == (row == "teacher")
    assert [line.split()[0] for line in said.splitlines()[-4:]] == ROWS


@pytest.mark.slow
def test_both_ways_of_stage_4_start_alike_and_take_equal_tokens(finished):
    out, _ = finished
    manifests = [json.loads((out / "seed-1337" / row / "manifest.json").read_text()) for row in ROWS[2:]]
    assert {manifest["tokens"] for manifest in manifests} == {1024}
    assert len({manifest["parent"] for manifest in manifests}) == 1
    columns = [(out / "seed-1337" / row / "metrics.csv").read_text().splitlines()[0] for row in ROWS[2:]]
    assert ["student_rows" in header for header in columns] == [False, True]


@pytest.mark.slow
def test_the_same_command_measures_nothing_twice(finished, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.setattr(talks, "run_stage", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(talks, "talk", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(talks, "write_corpus", lambda *_, **__: pytest.fail("written again"))
    assert talks.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert "instruct_on_policy" in capsys.readouterr().out
    assert talks.main(["--tiny", "--device", "cpu", "--out", str(out), "--prompts", "3"]) == 2
    assert "another plan" in capsys.readouterr().err
