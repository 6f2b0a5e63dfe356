"""The commands of docs/paper_commands.md as they stand there, on a tiny teacher instead of the 7B one."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

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
  devices: 1
  optimizer: adamw
  magic_prime: auto
  warmup_steps: -1
"""
# What a machine without network can ask
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The sky is",
    "doc_to_choice": [" blue", " green"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
STAGE_FILES = ("distill1", "distill2", "distill3")


def documented_commands(replacements):
    """The `python3 SCRIPT ...` lines, as words, with each key of `replacements` replaced."""
    text = (ROOT / "docs" / "paper_commands.md").read_text().replace("\\\n", " ")
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, str(new))
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python3 ")]


def write_task(folder):
    """A task file of one question, and where it finds it."""
    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"answer": 0}\n')
    data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
    (folder / "colours.yaml").write_text(json.dumps(TASK | {"dataset_kwargs": data}))


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
    sizes = yaml.safe_load(capsys.readouterr().out)
    (tmp_path / "sizes.yaml").write_text(json.dumps(sizes))
    (tmp_path / "tiny.yaml").write_text(f"{TINY}  data_file: {corpus_folder / 'train'}\n")
    named = {"path": "out/Qwen2.5-7B-Instruct.pth", **sizes}
    (tmp_path / "teacher.yaml").write_text(json.dumps({"train": {"teacher": named}}))
    (tmp_path / "out").mkdir()
    write_task(tmp_path / "tasks")
    stages = {f"-c configs/{name}.yaml": f"-c configs/{name}.yaml -c tiny.yaml" for name in STAGE_FILES}
    commands = documented_commands(
        {
            "path/to/Qwen2.5-7B-Instruct": teacher,
            "configs/qwen7b.yaml": "sizes.yaml",
            "configs/qwen7binstructteacher.yaml": "teacher.yaml",
            "L28-D3584": "L3-D64",
            "dragon_test.py out/QRWKV7-7B": "dragon_test.py out/QRWKV7-7B --seed 1 --max-tokens 20",
            "--tasks paper": "--tasks colours --include-path tasks --device cpu",
            **stages,
        }
    )
    scripts = ["convert_hf_to_pth.py", *["train.py"] * 3, "convert_to_safetensors.py", "dragon_test.py"]
    assert [command[0] for command in commands] == [*scripts, "run_lm_eval.py"]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for a second
    for command in commands:
        assert run(command, monkeypatch) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert printed.out.partition("spoke perfect Chinese.")[2].partition("\nteacher: ")[0].strip()
    scores = json.loads((tmp_path / "out" / "QRWKV7-7B.json").read_text())["scores"]
    assert [score["model"] for score in scores] == ["teacher", "QRWKV7-7B"]

    tokens = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(0))
    folders = [load_model(Path(f"out/L3-D64-qwerky7_qwen2-{number}")) for number in (1, 2, 3)]
    logits = [model(tokens).logits for model in folders]
    assert reload_max_abs_diff(folders[2], tmp_path / "out" / "QRWKV7-7B", tokens[0].tolist()) == 0
    assert folders[2].config.groupnorm_att and not folders[2].config.balance_state
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
