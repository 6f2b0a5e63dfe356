"""A run's page: what it tells, that it tells nothing else, and what it makes of a run that lacks something."""

import json
import re
import shutil

import pytest
import tiny_run

from radlads.cli import main
from radlads.report.charts import COLOURS, Chart
from radlads.report.page import write_page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny_run.run_folder(tmp_path_factory.mktemp("run"))
    write_page(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def words(page):
    """What a reader sees, charts' text included."""
    page = re.sub(r"<(style|title)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


@pytest.mark.parametrize(
    "text",
    [
        "Some-Teacher as RAD-RWKV7",
        "Qwen/Some-Teacher",
        "87,000 tokens and 2.9 minutes of training",
        "align 29,000 1.0 500 16 4",
        "0.001 to 1e-05 KL fp32",
        "0.001 to 1e-05 0.5 KL + 0.5 CE fp32",
        "teacher 2.0123 0.0000 100.0%",
        "extend 2.2500 0.3000 77.7%",
        "93.2% of the held-out gap",
        "512× smaller state than the teacher&#x27;s at 65,536 tokens",
        "1.98× the teacher&#x27;s speed at position 8,000",
        "token at position 100 1.41 ms 2.50 ms 0.56×",
        "piqa acc 400 25.0% 75.0% ± 2.0 65.0% ± 2.0 (80%)",
        "wikitext perplexity 62 12.3456 12.3456",
        "32,768 tokens of a book, windows of 8,192.",
        "Percent of 60 prompts in each cell",
        "a standard error of at most 6.5.",
        "First seed 11.",
        "radlads 9.9.9",
        "abc123",
        "AutoModelForCausalLM.from_pretrained(",
        "At most 1.2 GB of main memory",
    ],
)
def test_the_page_tells_what_the_files_hold(page, text):
    assert text in words(page)


def test_a_whole_run_lacks_nothing(page):
    assert "not measured" not in page


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(r"\b(src|srcset|poster|action)=|@import|url\((?!#)|https?:", page)
    assert set(re.findall(r'href="([^"]*)"', page)) - {"data:,"} == set(re.findall(r'href="(#[^"]*)"', page))


def test_text_of_a_model_stays_text(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;student&#x27;)&lt;/script&gt;" in page


def test_ids_are_unique_and_all_references_lead_somewhere(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)


def test_charts_take_their_colours_from_the_page(page):
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == 3 + 1 + 1 + 1 + 4 + 1 + 3
    assert not any(colour in chart for chart in charts for colour in COLOURS.values())
    style = re.search(r"<style>.*?</style>", page, flags=re.DOTALL).group()
    assert all(style.count(f"--{name}:") == 2 for name in COLOURS), "a value in the light, and one in the dark"
    plain = Chart("plain", "A line", lambda axes: axes.plot([1, 2], color=COLOURS["teacher"])).svg()
    assert "stroke: var(--teacher)" in plain
    assert "#000000" not in plain


def test_plots_are_written_beside_it(run):
    plots = sorted(path.stem for path in (run / "plots").iterdir())
    assert plots == sorted(
        [*(f"loss-{stage}" for stage in tiny_run.STAGES), "alignment", "heldout", "heldout-course", "loss-by-position"]
        + [f"{task}-{model}" for task in ("passkey", "needle") for model in ("teacher", "student")]
        + ["cost-decode-ms", "cost-prefill-tokens-per-s", "cost-state-bytes"]
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "plots").iterdir())


@pytest.fixture
def own(tmp_path):
    """A run of the test's own."""
    return tiny_run.run_folder(tmp_path / "run")


def remove(folder, *patterns):
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_what_is_missing_is_said_with_the_command_that_measures_it(own):
    remove(own, "eval.json", "longcontext", "*/metrics.csv", "*/heldout.csv")
    page = write_page(own).read_text()
    assert page.count("not measured") == 5
    assert f"radlads longcontext {own}/hf \\\n    --teacher Qwen/Some-Teacher \\\n    --out {own}/longcontext" in page
    assert f"radlads eval {own}/1-align {own}/2-distill {own}/hf" in page


def test_stages_without_a_summary_tell_their_own_measurements(own):
    remove(own, "summary.json", "eval.json", "longcontext", "hf", "*/metrics.csv", "*/heldout.csv")
    text = words(write_page(own).read_text())
    assert "distill 3.1250 0.4375 50.0%" in text
    assert "Each stage&#x27;s own held-out windows" in text
    assert "gap" not in text
    assert "There is no export in this run" in text


def test_a_stage_that_ran_twice_is_shown_twice(own):
    remove(own, "summary.json", "longcontext", "1-align", "3-extend")
    tiny_run.stage_folder(own / "2-distill-longer", "distill")
    write_page(own)
    assert (own / "plots" / "loss-distill-2-distill-longer.png").is_file()
    assert (own / "plots" / "loss-distill-2-distill.png").is_file()


def test_one_stages_folder_is_a_run(tmp_path, capsys):
    folder = tiny_run.stage_folder(tmp_path / "mine", "align")
    assert main(["report", str(folder)]) == 0
    assert f"wrote {folder}/report.html" in capsys.readouterr().out
    assert "Stages: mine." in (folder / "report.html").read_text()


def damage_metrics(folder):
    (folder / "1-align" / "metrics.csv").write_text("tokens,loss\n1,two\n")


def damage_manifest(folder):
    (folder / "2-distill" / "manifest.json").write_text("{}")


def damage_recipe(folder):
    (folder / "2-distill" / "config.yaml").write_text("train: {")


def damage_summary(folder):
    (folder / "summary.json").write_text("{")


def damage_long_context(folder):
    results = tiny_run.long_context()
    del results["models"]["student"]["loss"][3]["loss"]
    (folder / "longcontext" / "longcontext.json").write_text(json.dumps(results))


def remove_stages(folder):
    remove(folder, "[123]-*")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_metrics, "1-align/metrics.csv is damaged"),
        (damage_manifest, "2-distill/manifest.json is damaged"),
        (damage_recipe, "2-distill/config.yaml is damaged: it is not YAML"),
        (damage_summary, "summary.json is damaged: it is not JSON"),
        (damage_long_context, "longcontext.json lacks 'loss'"),
        (remove_stages, "holds no finished stage"),
        (shutil.rmtree, "holds no finished stage"),
    ],
)
def test_damage_is_one_sentence(own, capsys, damage, message):
    damage(own)
    assert main(["report", str(own)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
