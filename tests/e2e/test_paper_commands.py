"""The commands of docs/paper_commands.md as they stand there, on a tiny teacher instead of the 7B one."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.recipes.reload_check import reload_max_abs_diff

ROOT = Path(__file__).parents[2]
# What a tiny teacher and a CPU cannot take from the files
TINY = """\
model: {ctx_len: 16}
train:
  micro_bsz: 4
  accumulate_grad_batches: 1
  my_exit_tokens: 320
  precision: fp32
  accelerator: cpu
  warmup_steps: -1
"""
STAGE_FILES = ("distill1", "distill2", "distill3")


def documented_commands(replacements):
    """The `python3 SCRIPT ...` lines, as words, with each key of `replacements` replaced."""
    text = (ROOT / "docs" / "paper_commands.md").read_text().replace("\\\n", " ")
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, str(new))
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python3 ")]


def run(command, monkeypatch):
    """Run a script of the repository root as Python would, up to its exit code."""
    script, *arguments = command
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stopped.value.code


def test_the_documented_commands_convert_a_teacher(teacher, corpus_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert main(["config", "from-hf", str(teacher)]) == 0
    (tmp_path / "sizes.yaml").write_text(capsys.readouterr().out)
    (tmp_path / "tiny.yaml").write_text(f"{TINY}  data_file: {corpus_folder / 'train'}\n")
    (tmp_path / "teacher.yaml").write_text(f"train: {{teacher: {{hf_path: {teacher}}}}}")
    (tmp_path / "out").mkdir()
    stages = {f"-c configs/{name}.yaml": f"-c configs/{name}.yaml -c tiny.yaml" for name in STAGE_FILES}
    commands = documented_commands(
        {
            "path/to/Qwen2.5-7B-Instruct": teacher,
            "configs/qwen7b.yaml": "sizes.yaml",
            "configs/qwen7binstructteacher.yaml": "teacher.yaml",
            "L28-D3584": "L3-D64",
            **stages,
        }
    )
    scripts = ["convert_hf_to_pth.py", *["train.py"] * 3, "convert_to_safetensors.py"]
    assert [command[0] for command in commands] == scripts
    for command in commands:
        assert run(command, monkeypatch) == 0, capsys.readouterr().err
    assert "warning" not in capsys.readouterr().err

    tokens = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(0))
    folders = [load_model(Path(f"out/L3-D64-qwerky7_qwen2-{number}")) for number in (1, 2, 3)]
    logits = [model(tokens).logits for model in folders]
    assert reload_max_abs_diff(folders[2], tmp_path / "out" / "QRWKV7-7B", tokens[0].tolist()) == 0
    assert folders[2].config.groupnorm_att and not folders[2].config.balance_state
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
