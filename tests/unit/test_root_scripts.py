"""The scripts of the repository root: what they answer to --help and to words in the wrong order."""

import pytest
from root_scripts import ROOT, run_script

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def test_the_published_scripts_are_there():
    converters = ["convert_hf_to_pth.py", "convert_to_safetensors.py"]
    assert [*converters, "dragon_test.py", "make_data_hf.py", "run_lm_eval.py", "train.py"] == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_it_is_used(script, monkeypatch, capsys):
    assert run_script(monkeypatch, script, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_the_dragon_prompt_takes_its_folder_first(monkeypatch, capsys, tmp_path):
    assert run_script(monkeypatch, "dragon_test.py", "--max-tokens", "5", tmp_path) == 2
    output = capsys.readouterr()
    assert "unrecognized arguments: --max-tokens" in output.err and not output.out
    assert run_script(monkeypatch, "dragon_test.py", tmp_path, "--max-tokens", "5") == 2
    assert "is not a model folder" in capsys.readouterr().err
