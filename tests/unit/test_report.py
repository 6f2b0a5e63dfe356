"""A run's page: what it tells, that it tells nothing else, and what it makes of a run that lacks something."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny_run

from radlads.checksums import sha256
from radlads.cli import main
from radlads.report.charts import COLOURS, Chart
from radlads.report.page import write_page
from radlads.report.training_sections import _recipe_row


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
        "Tokens: 87,000; minutes of training, held-out measurements included: 2.9;",
        "align 29,000 1.0 500 16 4",
        "0.001 to 1e-05 KL fp32",
        "0.001 to 1e-05 0.5 KL + 0.5 CE fp32",
        "teacher 2.0123 0.0000 100.0%",
        "extend 2.2500 0.3000 77.7%",
        "93.2% of the held-out gap",
        "512× smaller state than the teacher&#x27;s at 65,536 tokens",
        "1.98× the teacher&#x27;s speed at position 8,000",
        "token at position 100 1.41 ms 2.50 ms 0.56×",
        "piqa acc 400 25.0% 75.0% ± 2.0 65.0% ± 2.0 (80.0%)",
        "wikitext perplexity 62 none 12.3456 12.3456",
        "32,768 tokens of a book, windows of 8,192.",
        "Percent of 60 prompts in each cell",
        "a standard error of at most 6.5.",
        "First seed 11.",
        "radlads 9.9.9",
        "abc123",
        "AutoModelForCausalLM.from_pretrained(",
        "GB of main memory at most: 1.2.",
        "Parameters 64",
        "State: the bytes of what a model&#x27;s cache holds after reading. Peak memory: the most that was allocated",
    ],
)
def test_the_page_tells_what_the_files_hold(page, text):
    assert text in words(page)


def blanks(page):
    """Cells, facts and figures in which nothing stands, or a None."""
    return re.findall(r"<(?:td|dd|b|pre|p)\b[^>]*>(?:\s|\bNone\b)*</", page) + re.findall(r"\bNone\b", words(page))


def test_a_whole_run_lacks_nothing(page):
    assert "not measured" not in page and "not recorded" not in page and not blanks(page)


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
    assert len(charts) == 3 + 1 + 1 + 1 + 4 + 1 + 4
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
        + ["cost-decode-ms", "cost-peak-bytes", "cost-prefill-tokens-per-s", "cost-state-bytes"]
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


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def told(own, monkeypatch):
    """A run of the test's own, whose charts, which take seconds, are not drawn."""
    monkeypatch.setattr(Chart, "save_png", lambda chart, folder: None)
    monkeypatch.setattr(Chart, "svg", lambda chart: "")
    return own


SUMMARY_KEYS = {
    "gap_closed": "not measured of the held-out gap",
    "teacher": "teacher not measured not measured not measured",
    "align": "align not measured not measured not measured",
    "bytes": "state of teacher and student at a few lengths: not measured",
    "decode_ms": "time of a token of teacher and student at a few positions: not measured",
    "sample": "Samples not measured",
    "reload_max_abs_diff": "without radlads: not measured.",
    "peak_rss_gb": "GB of main memory at most: not measured.",
}


def test_whatever_the_summary_lacks_is_not_measured(told):
    edit(told / "summary.json", lambda summary: [summary.pop(key) for key in SUMMARY_KEYS])
    page = write_page(told).read_text()
    assert [text for text in SUMMARY_KEYS.values() if text not in words(page)] == []
    assert not blanks(page)


def test_whatever_a_manifest_lacks_is_not_measured(told):
    remove(told, "summary.json", "longcontext")
    edit(
        told / "2-distill" / "manifest.json",
        lambda manifest: [manifest.pop(key) for key in ("tokens", "seconds", "heldout")],
    )
    text = words(write_page(told).read_text())
    assert "distill not measured not measured not measured 16 4" in text
    assert "distill not measured not measured not measured extend 3.1250" in text
    assert "Tokens: not measured; minutes of training, held-out measurements included: not measured;" in text


def test_a_part_of_long_context_that_a_model_lacks_is_not_measured(told):
    def forget(results):
        del results["models"]["student"]["needle"], results["models"]["teacher"]["costs"]

    edit(told / "longcontext" / "longcontext.json", forget)
    text = words(write_page(told).read_text())
    assert "needle of the student: not measured" in text and "costs of the teacher: not measured" in text
    assert text.count("not measured") == 2


def test_a_peak_that_a_cpu_does_not_tell_is_not_measured(told):
    def forget(results):
        for row in results["models"]["student"]["costs"]:
            row["peak_bytes"] = None
        for row in results["models"]["teacher"]["costs"]:
            del row["peak_bytes"]

    edit(told / "longcontext" / "longcontext.json", forget)
    page = write_page(told).read_text()
    assert "peak memory by length, which only CUDA tells: not measured" in words(page)
    assert "State of one sequence" in words(page) and "Peak memory beside" not in words(page)


def test_charts_of_the_training_that_are_missing_are_named(told):
    remove(told, "1-align/metrics.csv", "2-distill/heldout.csv")
    text = words(write_page(told).read_text())
    for gap in ("align: training loss", "align: alignment by layer", "distill: held-out loss while training"):
        assert f"{gap}: not measured" in text


def test_a_stage_that_says_nothing_of_itself_leaves_no_blank(told):
    remove(told, "*")
    folder = tiny_run.stage_folder(told / "2-distill", "distill")
    remove(folder, "*.yaml", "config.json", "*.csv", "*.safetensors")
    (folder / "manifest.json").write_text('{"stage": "distill", "sha256": {}}')
    page = write_page(told).read_text()
    assert not blanks(page)
    for fact in ("Teacher", "Layers", "Heads", "Vocabulary", "Started from", "Training text", "Weights"):
        assert f"{fact} not recorded" in words(page)
    assert "Parameters not measured" in words(page)


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


@pytest.mark.parametrize("name", ["metrics.csv", "heldout.csv"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda text: "", "is empty"),
        (lambda text: "\n", "is empty"),
        (lambda text: text.splitlines()[0] + "\n", "is empty"),
        (lambda text: text[:-1], "is cut short"),
        (lambda text: text[:-4] + "\n", "is cut short"),
        (lambda text: "\0" * len(text), "is empty"),
        (lambda text: text.replace("29000", "29\0"), "holds something else than numbers"),
        (lambda text: text.replace("29000", "29001"), "is not the file its manifest.json describes"),
    ],
)
def test_damaged_curves_are_not_called_not_measured(own, capsys, name, damage, what):
    path = own / "2-distill" / name
    edit(path.with_name("manifest.json"), lambda manifest: manifest.update(sha256={name: sha256(path)}))
    path.write_text(damage(path.read_text()))
    assert main(["report", str(own)]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"radlads: {path} is damaged: it {what}; copy it anew, or remove it to have it called not measured\n"
    )


@pytest.mark.parametrize(("manifest", "devices", "batch"), [(96, 8, "96"), (None, 1, "8"), (None, 8, "not recorded")])
def test_a_steps_sequences_are_those_of_all_processes(manifest, devices, batch):
    train = {"micro_bsz": 4, "accumulate_grad_batches": 2, "devices": devices, "num_nodes": 1}
    facts = {} if manifest is None else {"sequences_per_step": manifest}
    stage = SimpleNamespace(name="align", config={"train": train}, manifest=facts)
    assert _recipe_row(stage)[5] == batch
