"""An evaluation shared by two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": [" blue", " a colour"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(teacher, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from radlads.cli import main

    questions = [{"question": f"Colour number {number} is", "answer": number % 2} for number in range(7)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "colours.yaml").write_text(json.dumps(TASK | {"dataset_kwargs": data}))
    command = ["eval", str(teacher), "--tasks", "colours", "--include-path", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "one.json")]) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "radlads.cli",
    ]
    result = subprocess.run(
        [*launch, *command, "--output", str(tmp_path / "two.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("questions") == 1  # one table
    assert "0/4" in result.stderr and "0/7" not in result.stderr  # questions of one process
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("one", "two"))
    assert one == two and one[0]["num_questions"] == 7
