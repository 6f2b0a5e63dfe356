"""`radlads demo --instruct`: four stages, conversations by the teacher or given, and what the run says of them."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
from safetensors.torch import load_file, save_file

from radlads.cli import main
from radlads.data.binidx import BinIdxReader
from radlads.recipes import conversion, demo_recipes
from radlads.recipes.export_source import find_source

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SMALL = {"model.ctx_len": 160, "train.micro_bsz": 1, "train.my_exit_tokens": 320, "train.heldout_tokens": 320}
SMALL |= {"train.precision": "fp32", "train.accelerator": "cpu"}


@pytest.fixture(scope="module")
def talking(teacher, tmp_path_factory):
    """A teacher with a template, that often ends a reply."""
    folder = tmp_path_factory.mktemp("talking") / "teacher"
    shutil.copytree(teacher, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][256] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def demo(teacher, corpus_folder, out, *options):
    words = ["demo", "--teacher", teacher, "--out", out, "--data", corpus_folder / "train"]
    words += ["--heldout-data", corpus_folder / "heldout", *options]
    words += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    return main([str(word) for word in words])


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_conversion_ends_with_stage_4(talking, corpus_folder, tmp_path, monkeypatch, capsys):
    few = {"decode_positions": (10, 20), "heldout_tokens": 512, "num_prompts": 6, "reply_tokens": 16}
    recipe = replace(demo_recipes.DemoRecipe(), **few)
    monkeypatch.setitem(demo_recipes._OTHERS, "cpu", recipe)
    out = tmp_path / "run"

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(conversion, "_measure_use", killed)
        demo(talking, corpus_folder, out, "--instruct")
    assert "data    chat:" in capsys.readouterr().out
    assert BinIdxReader(out / "data" / "chat").num_documents <= 6
    monkeypatch.setattr(conversion, "write_corpus", lambda *_, **__: pytest.fail("written again"))
    assert demo(talking, corpus_folder, out, "--instruct") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "4-instruct: finished earlier, kept" in said and "\ninstruct " in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["instruct"]["tokens"] == 320 and summary["reload_max_abs_diff"] == 0
    assert find_source(out, None).stages[-1].name == "instruct"
    page = (out / "report.html").read_text()
    assert "instruct: training loss" in page and "<td>instruct</td>" in page
    assert demo(talking, corpus_folder, out) == 2
    assert "another conversion (different: " in capsys.readouterr().err


def test_conversations_that_do_not_fit_are_refused_before_anything_is_written(
    teacher, talking, corpus_folder, tmp_path, capsys
):
    def error(teacher, *options):
        assert demo(teacher, corpus_folder, tmp_path / "run", *options) == 2
        assert not (tmp_path / "run" / "1-align").exists()
        return capsys.readouterr().err

    assert "has no chat template: copy chat_template.jinja" in error(teacher, "--instruct")
    assert "give it with --instruct" in error(talking, "--chat", tmp_path / "x")
    assert "train.mask is missing" in error(talking, "--instruct", "--chat", corpus_folder / "train")


def test_conversations_may_be_given(talking, corpus_folder, tmp_path):
    tiny.chat_corpus(tmp_path / "chat")
    from radlads.recipes.stage_configs import Conversion, stage_configs

    asked = Conversion(teacher=talking, out=tmp_path, instruct=True, chat=tmp_path / "chat")
    configs = stage_configs(asked)
    assert list(configs) == ["align", "distill", "extend", "instruct"]
    assert configs["instruct"].train.data_file == str(tmp_path / "chat")
    assert configs["instruct"].train.validation_data_file == str(tmp_path / "data" / "heldout")
