"""The training commands of README.md and docs/paper_commands.md, and the files that they name."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from radlads.config import parse_config
from radlads.recipes.single_stage import run_folder

ROOT = Path(__file__).parents[2]


def stages_of(page, start):
    """The configurations of the page's training commands, which begin with `start`, in order."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith(start)]
    return [parse_config(command[2:], write=pytest.fail) for command in commands]


def test_the_documented_stages_of_the_7b_example_follow_each_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = stages_of("docs/paper_commands.md", "python3 train.py ")
    student = SimpleNamespace(num_hidden_layers=28, hidden_size=3584)
    folders = [str(run_folder(config, student)) for config in stages]
    assert folders == [f"out/L28-D3584-qwerky7_qwen2-{number}" for number in (1, 2, 3)]
    assert [config.train.load_model for config in stages[1:]] == [f"{folder}/rwkv-final.pth" for folder in folders[:2]]
    assert [config.train.attention_distillation_stage for config in stages] == [1, 2, -1]
    assert [config.train.teacher.path for config in stages] == ["", *["out/Qwen2.5-7B-Instruct.pth"] * 2]


@pytest.mark.parametrize("page", ["README.md", "docs/paper_commands.md", "docs/which_student.md"])
def test_configuration_files_that_a_page_names_are_there(page):
    named = re.findall(r"configs/([\w.-]+\.yaml)", (ROOT / page).read_text())
    assert named and {name for name in named if not (ROOT / "configs" / name).is_file()} == set()


def test_the_readmes_stages_are_the_papers(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = stages_of("README.md", "radlads train -c configs")
    assert [config.model.ctx_len for config in stages] == [512, 512, 16384]
    assert [config.train.my_exit_tokens // 10**6 for config in stages] == [100, 500, 100]
    assert [config.train.lr_init for config in stages] == [1e-3, 1e-5, 1e-5]
