"""The conversion benchmark in small, its corpus, and the losses by position it reports."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
import torch

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.distill.heldout import measure
from radlads.evaluation.perplexity import check_edges, loss_by_position, spread_windows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDENTS = ["rad_rwkv7", "rad_rwkv7_group_norm", "rad_rwkv6"]
sys.path.append(str(BENCHMARKS))

import python_conversion  # noqa: E402
import python_corpus  # noqa: E402


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of many small packages, modules of the standard library, and one large one."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(library.glob("[a-z]*.py")) if 2000 < path.stat().st_size < 60_000][:60]
    for path in modules:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "large").mkdir()
    for path in sorted((library / "asyncio").glob("*.py")):
        (folder / "large" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """Output folder and printed lines of a whole tiny run."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, BENCHMARKS / "python_conversion.py", "--out", out, "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--text", text, "--workers", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout.splitlines()


@pytest.mark.slow
def test_a_run_records_every_model_after_every_stage(finished):
    out, lines = finished
    results = json.loads((out / "results.json").read_text())
    assert list(results["students"]) == STUDENTS
    for stages in results["students"].values():
        assert list(stages) == ["setup", "align", "distill", "extend"]
        for facts in stages.values():
            assert {"loss", "kl", "top1", "num_tokens"} == facts["heldout"].keys()
            assert [(each["first"], each["end"]) for each in facts["by_position"]] == [(0, 32), (32, 128), (128, 256)]
        assert stages["distill"]["heldout"]["kl"] < stages["setup"]["heldout"]["kl"]
    assert results["teacher"]["heldout"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["teacher"]["tokens"] >= results["plan"]["teacher_tokens"] > 0
    assert results["teacher"]["long_tokens"] > 0
    assert sum("rad_rwkv6 extend" in line for line in lines) == 2  # as measured, and in the table


@pytest.mark.slow
def test_all_students_get_the_same_tokens(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    budgets = [
        [stages[stage]["tokens"] for stage in ("align", "distill", "extend")] for stages in results["students"].values()
    ]
    assert budgets == [[2048, 2048, 1024]] * 3


@pytest.mark.slow
def test_the_students_differ_in_what_they_are_named_for(finished):
    models = [json.loads((finished[0] / name / "3-extend" / "config.json").read_text()) for name in STUDENTS]
    assert [set(model["time_mixers"]) for model in models] == [{"rad_rwkv7"}, {"rad_rwkv7"}, {"rad_rwkv6"}]
    assert [model["balance_state"] for model in models] == [True, False, True]
    assert [model["groupnorm_att"] for model in models] == [False, True, False]


@pytest.mark.slow
def test_a_student_that_fails_is_recorded_and_corpus_and_teacher_are_kept(finished, tmp_path):
    for kept in ("data", "teacher"):
        shutil.copytree(finished[0] / kept, tmp_path / kept)
    weights = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--set", "train.lr_init=1e30"]
    arguments += ["--results", str(tmp_path / "elsewhere.json")]
    assert python_conversion.main([*arguments, "--only", "rad_rwkv6", "--only", "rad_rwkv7"]) == 1
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == weights
    students = json.loads((tmp_path / "elsewhere.json").read_text())["students"]
    assert list(students) == ["rad_rwkv6", "rad_rwkv7"]
    for stages in students.values():
        assert "lower the learning rate" in stages["error"]
        assert stages["setup"]["heldout"]["num_tokens"] == 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "rad_rwkv7 exists already"),
        (["--device", "cpu", "--only", "rad_rwkv6", "--set", "train.lr_init"], "must be KEY=VALUE"),
        (["--device", "cpu", "--only", "rad_rwkv6", "--context", "4096"], "more than 4 times --context"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, capsys, words, message):
    (tmp_path / "rad_rwkv7").mkdir()
    with pytest.raises(SystemExit) as stop:
        python_conversion.main(["--out", str(tmp_path), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rad_rwkv7"]


def test_results_never_overwrite_those_of_an_earlier_run(tmp_path):
    for name in ("results.json", "results-2.json", "results-3.json"):
        assert python_conversion.results_file(tmp_path) == tmp_path / name
        (tmp_path / name).touch()


def test_whole_packages_are_held_out_and_a_large_one_never(text):
    sources = python_corpus.find_sources([text])
    held = python_corpus.held_out_packages(sources)
    total = sum(source.num_bytes for source in sources)
    held_bytes = sum(source.num_bytes for source in sources if source.package in held)
    assert 0.02 * total < held_bytes < 0.05 * total
    assert "large" not in held
    assert held == python_corpus.held_out_packages(reversed(sources))


def test_copies_of_held_out_text_are_left_out_of_training(text, tmp_path):
    sources = python_corpus.find_sources([text])
    held = python_corpus.held_out_packages(sources)
    original = next(source for source in sources if source.package in held)
    kept = next(source for source in sources if source.package not in held)
    # A vendored copy, edited at its top, and a byte-by-byte copy of a training file
    vendored, double = text / "large" / "vendored.py", text / "large" / "zz_double.py"
    vendored.write_text("# edited, and a line that the original lacks\n" + original.path.read_text())
    double.write_bytes(kept.path.read_bytes())
    try:
        facts = python_corpus.build_corpus(
            tmp_path, [text], vocab_size=320, sample_bytes=100_000, workers=2, tell=lambda line: None
        )
    finally:
        vendored.unlink()
        double.unlink()
    assert facts["copies_left_out"] == 2
    assert facts["heldout"]["files"] + facts["train"]["files"] == len(sources)
    tokenizer = python_corpus.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    train, heldout = BinIdxReader(tmp_path / "train"), BinIdxReader(tmp_path / "heldout")
    written = [tokenizer.decode(heldout.document(i)[:-1].tolist()) for i in range(heldout.num_documents)]
    assert original.path.read_text() in written
    assert heldout.document(0)[-1] == tokenizer.token_to_id(python_corpus.END_OF_TEXT)
    assert train.num_tokens == facts["train"]["tokens"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    source = open_teacher(tiny.teacher_folder(tmp_path_factory.mktemp("teacher")))
    torch.manual_seed(0)
    config = tiny.stage_config(Path("none"), "distill")
    return {"teacher": build_teacher(source), "student": build_student(source, config.model)[0]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return BinIdxReader(tiny.corpus(tmp_path_factory.mktemp("corpus") / "heldout", num_tokens=2000))


@pytest.mark.parametrize("name", ["teacher", "student"])
@pytest.mark.parametrize("segment_tokens", [8192, 17, 1])
def test_bins_add_up_to_the_mean_loss_however_the_window_is_cut(models, corpus, name, segment_tokens):
    model, options = models[name], {"context_tokens": 40, "max_tokens": 200, "batch_windows": 2}
    bins = loss_by_position(model, corpus, edges=(0, 7, 40), segment_tokens=segment_tokens, **options)
    windows = torch.stack(list(spread_windows(corpus, 40, 200)))
    assert [each.num_tokens for each in bins] == [5 * 7, 5 * 33]
    mean = sum(each.loss * each.num_tokens for each in bins) / 200
    assert mean == pytest.approx(measure(model, None, [windows]).loss, abs=1e-4)
    logits = model(windows[:, :7], use_cache=False).logits
    first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:8].flatten()).item()
    assert bins[0].loss == pytest.approx(first, abs=1e-4)
    assert bins[0].perplexity == pytest.approx(2.718281828**first, rel=1e-3)


def test_windows_lie_evenly_over_the_whole_corpus(corpus):
    windows = spread_windows(corpus, 100, 500)
    starts = [
        int((torch.from_numpy(corpus.tokens.astype("int64")).unfold(0, 101, 1) == window).all(1).nonzero()[0])
        for window in windows
    ]
    assert starts == [0, 300, 700, 1100, 1500]
    assert len(spread_windows(corpus, 100)) == 19
    assert len(spread_windows(corpus, 100, 5)) == 1


@pytest.mark.parametrize("edges", [(0,), (0, 0), (5, 3), (-1, 4), (0, 41)])
def test_edges_that_mean_nothing_are_refused(edges):
    with pytest.raises(ValueError, match="must rise from 0 or more to at most the context of 40"):
        check_edges(edges, 40)
