"""A model that is spread is loaded and saved without any process holding it, and is what one process would hold."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import memory
import pytest
import stages
import torch
from launch import AT_MOST_S

from radlads.checkpoint.model_folder import load_model
from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student

LARGEST_TENSOR = 8192 * 512 * 4
pytestmark = pytest.mark.timeout(1200)
SLACK = 25_000_000  # what gathering, torch and the allocator take besides


STRATEGIES = [
    "fsdp",
    pytest.param(
        "deepspeed_stage_3",
        marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    memory.save_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module", params=STRATEGIES)
def strategy(request, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), str(folder), request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=AT_MOST_S)
    assert done.returncode == 0, done.stderr
    return request.param


@pytest.fixture(scope="module")
def whole(folder):
    config = load_config([], stages.keys(folder, folder / "teacher", "distill", "unused"))
    torch.manual_seed(0)
    return build_student(open_teacher(folder / "teacher"), config.model)[0]


def found_by(folder, strategy):
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of a process's memory")
def test_no_process_holds_more_than_its_rows_and_a_tensor(folder, strategy, whole):
    all_bytes = sum(parameter.nbytes for parameter in whole.parameters())
    for held in found_by(folder, strategy):
        assert all_bytes * 0.4 < held["building"] < all_bytes / 2 + LARGEST_TENSOR + SLACK < 0.75 * all_bytes
        # A model in shards has run before, and what that left free is used again
        assert held["saving"] < (2 if strategy == "fsdp" else 3) * LARGEST_TENSOR + SLACK < all_bytes / 3


def test_what_was_saved_is_the_model(folder, strategy, whole):
    saved = load_model(folder / strategy)
    copied = [name for name, each in whole.named_parameters() if "proj" in name or "norm" in name or "embed" in name]
    parameters = dict(saved.named_parameters())
    assert len(copied) > 100
    assert all(torch.equal(parameters[name], dict(whole.named_parameters())[name]) for name in copied)
    if strategy == "fsdp":
        with torch.no_grad():
            logits = saved(torch.arange(64).view(2, 32), use_cache=False).logits[0, -1, :8]
        assert all(held["logits"] == pytest.approx(logits.tolist(), abs=1e-5) for held in found_by(folder, strategy))
    assert len(list((folder / strategy).glob("model-*-of-*.safetensors"))) > 3
