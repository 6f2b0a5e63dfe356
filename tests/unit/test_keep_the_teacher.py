"""keep_the_teacher.py in small: its rows, where it goes on, a row that fails; the ablations and the changed rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch

from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.kept_layers import kept_student
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.evaluation.agreement import agreement_by_position, compared_windows
from radlads.evaluation.baselines import without, without_kept_layers
from radlads.evaluation.perplexity import spread_windows

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import keep_measures
import keep_plan
import keep_results
import keep_rows
import keep_the_teacher

ROWS = ["paper", "window_third", "window_kept_third", "teacher", "teacher_window_untrained"]
TRAINED = {"paper": 1.0, "window_third": 1 / 3, "window_kept_third": 1 / 3}
WINDOW = {"model.mixer.window_tokens": 8, "model.mixer.sink_tokens": 2}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A tiny run's options, --out among them, without rows."""
    text, library = tmp_path_factory.mktemp("text"), Path(sysconfig.get_paths()["stdlib"])
    for path in [path for path in sorted(library.glob("[a-z]*.py")) if 2000 < path.stat().st_size < 60_000][:40]:
        shutil.copy(path, text)
    out = tmp_path_factory.mktemp("run") / "out"
    return ["--tiny", "--device", "cpu", "--text", str(text), "--workers", "1", "--seeds", "1", "--out", str(out)]


@pytest.fixture(scope="module")
def finished(command):
    """The options and the rows of a whole tiny run, in this process."""
    assert keep_the_teacher.main([*command, "--jobs", "0", "--rows", *ROWS]) == 0
    return command, rows_in(command)


def rows_in(command):
    return json.loads((Path(command[-1]) / "keep_the_teacher.json").read_text())["python"]


@pytest.mark.slow
def test_each_row_has_its_measurements_and_its_ablations(finished):
    _, rows = finished
    parts = product(("window_third", "window_kept_third"), ("no_window", "no_recurrence"))
    assert rows.keys() == {*ROWS, *map("/".join, parts), "window_kept_third/no_kept_layers"}
    for name, row in rows.items():
        assert row["tokens_share"] == TRAINED.get(name.partition("/")[0], 0)
        assert row.keys() >= {"loss", "kl", "kl_recalled", "kl_rest", "top1", "needle", "seeds", "ratios", "run"}
        assert [each["end"] for each in row["by_position"]] == [16, 32, 64, 128, 256]
        (seed,) = row["seeds"].values()
        assert [cell["length_tokens"] for cell in seed["needle_cells"]] == [128] * 5 + [256] * 5
        assert row["run"].keys() == {"command", "commit", "date", "device", "versions", "plan"}
    assert rows["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["paper"]["tokens"] == {"1337": 6144} and rows["window_third"]["tokens"] == {"1337": 2048}
    assert len(rows["window_kept_third"]["layers"]["1337"]) == 1
    assert rows["window_third"]["ratios"]["kl_of_paper"] == rows["window_third"]["kl"] / rows["paper"]["kl"]
    assert len({row["kl"] for row in rows.values()}) == len(rows)


@pytest.mark.slow
def test_the_same_command_finds_everything_there_and_other_numbers_are_refused(finished, monkeypatch, capsys):
    command, rows = finished
    for name in ("run_stage", "agreement", "search"):
        monkeypatch.setattr(keep_rows, name, lambda *_, **__: pytest.fail("done again"))
    assert keep_the_teacher.main([*command, "--jobs", "0", "--rows", *ROWS]) == 0
    assert rows_in(command) == rows
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if "%" in line][:2] == ["teacher", "teacher_window_untrained"]
    assert "window_kept_third kl / paper <= 0.15: 0." in told and "window kl / paper <= 0.6: not measured" in told
    assert keep_the_teacher.main([*command, "--jobs", "0", "--align-tokens", "4096"]) == 2
    assert "is of a run with other numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_goes_on_after_its_last_finished_stage(finished, monkeypatch):
    command, rows = finished
    folder, stages, run_stage = Path(command[-1]) / "python" / "window_kept_third-seed-1337", [], keep_rows.run_stage
    shutil.rmtree(folder / "distill")
    (folder / "result.json").unlink()

    def noted(*arguments, **keywords):
        stages.append(arguments[3].name)
        return run_stage(*arguments, **keywords)

    monkeypatch.setattr(keep_rows, "run_stage", noted)
    assert keep_the_teacher.main([*command, "--jobs", "0", "--rows", "window_kept_third"]) == 0
    assert stages == ["distill"]
    assert rows_in(command)["window_kept_third"]["kl"] == pytest.approx(rows["window_kept_third"]["kl"], rel=1e-5)


@pytest.mark.slow
def test_a_row_goes_on_after_its_last_measurement(finished, monkeypatch):
    command, _ = finished
    path = Path(command[-1]) / "python" / "window_third-seed-1337" / "result.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({name: found[name] for name in found if name not in ("seconds", "no_recurrence")}))
    agreement, measured = keep_rows.agreement, []

    def noted(model, *arguments, **keywords):
        measured.append(model)
        return agreement(model, *arguments, **keywords)

    monkeypatch.setattr(keep_rows, "agreement", noted)
    assert keep_the_teacher.main([*command, "--jobs", "0", "--rows", "window_third"]) == 0
    (ablated,) = measured
    assert not any(block.self_attn.recurrent_scale.any() for block in ablated.model.layers)
    assert json.loads(path.read_text())["model"] == found["model"]


@pytest.mark.slow
def test_a_student_that_fails_is_told_of_and_the_others_go_on(finished, capsys):
    command, _ = finished
    failing = "paper:model.gate_rank_type=nothing"
    assert keep_the_teacher.main([*command, "--jobs", "2", "--rows", failing, "window_untrained"]) == 1
    told = capsys.readouterr().out
    assert f"{failing}, seed 1337: FAILED with 2: " in told and "gate_rank_type" in told
    assert f"failed: {failing}, seed 1337" in told
    rows = rows_in(command)
    assert "window_untrained" in rows and failing not in rows


@pytest.mark.slow
def test_who_is_told_to_end_ends_the_students_processes(finished, monkeypatch):
    command, _ = finished
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(keep_the_teacher, "_started", lambda *_: process)
    sleep = keep_the_teacher.time.sleep

    def told_to_end(_):
        monkeypatch.setattr(keep_the_teacher.time, "sleep", sleep)  # which subprocess's wait uses, too
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(keep_the_teacher.time, "sleep", told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            keep_the_teacher.main([*command, "--jobs", "1", "--rows", "kept_third"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stop.value.code, process.poll()) == (143, -signal.SIGTERM)


@pytest.mark.slow
def test_another_teacher_is_measured_on_both_kinds_of_text(tmp_path):
    options = ["--tiny", "--device", "cpu", "--seeds", "1", "--jobs", "0", "--measure-tokens", "512"]
    arguments = [*options, "--out", str(tmp_path), "--teacher", "bundled", "--rows", "teacher_window_untrained"]
    assert keep_the_teacher.main(arguments) == 0
    row = json.loads((tmp_path / "keep_the_teacher.json").read_text())["bundled"]["teacher_window_untrained"]
    texts = row["seeds"]["1337"]["texts"]
    assert texts.keys() == {"english", "python"}
    assert row["kl"] == pytest.approx(sum(each["kl"] for each in texts.values()) / 2)


def test_what_is_recalled_is_a_pair_of_tokens_that_stood_64_tokens_earlier(teacher, tmp_path):
    tokens = torch.randint(3, 250, (201,), generator=torch.Generator().manual_seed(0))
    tokens[150:154] = tokens[80:84]  # 3 pairs, 70 tokens back
    tokens[190:194] = tokens[185:189]  # too near
    with BinIdxWriter(tmp_path / "text", tiny.VOCAB) as writer:
        writer.add_document(tokens.numpy().astype("uint16"))
    corpus = BinIdxReader(tmp_path / "text")
    models = build_teacher(open_teacher(teacher)), student(teacher, **WINDOW)
    facts = keep_measures.agreement(
        models[1], models[0], {"text": tmp_path / "text"}, edges=(0, 100, 200), max_tokens=200, batch_windows=1
    )
    (values,) = [values for _, values in compared_windows(models[1], models[0], spread_windows(corpus, 200))]
    assert facts["recalled_share"] * 200 == pytest.approx(3)
    assert facts["kl_recalled"] == pytest.approx(values[1, 0, 150:153].mean().item())
    parts = facts["recalled_share"] * facts["kl_recalled"] + (1 - facts["recalled_share"]) * facts["kl_rest"]
    assert parts == pytest.approx(facts["kl"])
    whole = agreement_by_position(models[1], models[0], corpus, context_tokens=200, edges=(0, 100, 200))
    assert [each["kl"] for each in facts["by_position"]] == pytest.approx([each.kl for each in whole])


def student(folder, **keys):
    torch.manual_seed(0)
    built, _ = build_student(open_teacher(folder), load_config([], {"model.gate_rank_type": 2} | keys).model)
    for name, parameter in built.named_parameters():
        if ".self_attn." in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return built


def tokens():
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))


def test_without_its_window_a_student_is_the_one_that_never_had_it(teacher):
    windowed, plain = student(teacher, **WINDOW), student(teacher)
    for block in windowed.model.layers:
        block.self_attn.recurrent_scale.data.fill_(1)
    own = windowed.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    before = windowed(tokens()).logits
    torch.testing.assert_close(without(windowed, "window")(tokens()).logits, plain(tokens()).logits)
    assert not torch.allclose(before, plain(tokens()).logits, atol=1e-3)
    assert torch.equal(windowed(tokens()).logits, before)  # the student itself is as it was


def test_without_its_recurrence_a_student_sees_its_window_and_sinks_alone(teacher):
    windowed = without(student(teacher, **WINDOW), "recurrence")
    changed = tokens()
    changed[:, 4] = (changed[:, 4] + 1) % 256  # no sink; three layers of 8 see back 21 tokens at most
    difference = (windowed(changed).logits - windowed(tokens()).logits).abs().amax((0, 2))
    assert difference[4:12].min() > 1e-4 and difference[26:].max() == 0


def test_a_model_without_a_window_has_nothing_to_leave_out(teacher):
    with pytest.raises(ValueError, match="without its window: no layer of the model has a softmax window"):
        without(student(teacher), "window")


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_the_aligned_mixers_stand_in_for_layers_that_are_kept(teacher, layers):
    aligned, source = student(teacher, **WINDOW), build_teacher(open_teacher(teacher))
    kept = kept_student(aligned, source, layers)
    torch.testing.assert_close(without_kept_layers(kept, aligned)(tokens()).logits, aligned(tokens()).logits)
    kept.lm_head.weight.data.mul_(2)  # as if trained
    ablated = without_kept_layers(kept, aligned)
    torch.testing.assert_close(ablated(tokens()).logits, 2 * aligned(tokens()).logits)
    assert ablated.config.time_mixers == aligned.config.time_mixers


def test_a_row_is_changed_by_its_fields_and_by_keys():
    row = keep_plan.parse_row("window_kept_third:sink_tokens=16,layers=2,5-6,train.optimizer=muon", keep_plan.TINY)
    assert (row.sink_tokens, row.window_tokens, row.layers) == (16, 16, "2,5-6")
    assert dict(row.keys) == {"train.optimizer": "muon"} and row.share == pytest.approx(1 / 3)
    assert row.given_layers(8) == [2, 5, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windows", "there is no row 'windows': choose from window, paper,"),
        ("window:sinks=4", "has 'sinks=4': write FIELD=VALUE with one of share, window_tokens,"),
        ("window:sink_tokens=many", "has 'sink_tokens=many', whose value is no int"),
        ("window:share=2", "has share=2.0: give a share above 0 and up to 1"),
        ("kept_third:by=needle", "has by=needle: choose kl or recalled"),
    ],
)
def test_a_row_that_means_nothing_is_refused_before_anything_runs(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        keep_the_teacher.main(["--out", str(tmp_path / "out"), "--tiny", "--device", "cpu", "--rows", text])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_goals_are_shares_of_the_paper_and_of_the_teacher():
    def row(**values):
        return {"tokens_share": 1.0, "loss": 1.0, "kl": 0.2, "kl_recalled": 0.4, "kl_rest": 0.1, "top1": 0.5} | {
            "needle": 0.5,
            "ratios": dict.fromkeys(("kl_of_paper", "kl_recalled_of_paper", "needle_of_teacher")),
            **values,
        }

    rows = {"paper": row(), "teacher": row(kl=0, needle=1.0), "window_kept_third": row(kl=0.02, needle=0.89)}
    *_, kl, recalled, needle = keep_results.table(rows)
    assert kl == "window_kept_third kl / paper <= 0.15: 0.100, reached"
    assert recalled == "window_kept_third kl_recalled / paper <= 0.12: 1.000, missed"
    assert needle == "window_kept_third needle / teacher >= 0.9: 0.890, missed"
    *_, needle = keep_results.table(rows | {"teacher": row(kl=0, needle=0.0)})
    assert needle == "window_kept_third needle / teacher >= 0.9: undecided, as teacher's needle is 0"
