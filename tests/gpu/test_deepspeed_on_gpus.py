"""DeepSpeed's ZeRO on two GPUs: the steps that one GPU makes of twice the batch, in fp32 and bf16."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch
from gpu_comparison import DRY_RUN
from safetensors.torch import load_file
from tolerances import TRAJECTORY_GPU

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import stages
from launch import curve, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DRY_RUN or torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = {"align": {}, "distill": {"micro_bsz": 2, "accumulate_grad_batches": 2}}
# Every pair of two is there; a start takes most of a run's time
CASES = [
    ("align", "fp32", "deepspeed_stage_1"),
    ("align", "bf16", "deepspeed_stage_2"),
    ("distill", "fp32", "deepspeed_stage_2"),
    ("distill", "bf16", "deepspeed_stage_1"),
    ("distill", "bf16", "deepspeed_stage_2"),
]


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """The folder of all runs, NAME-PRECISION-STRATEGY; `one` is a single GPU."""
    folder = stages.corpus(tmp_path_factory.mktemp("zero"))
    run(folder, [entry(folder, teacher, name, precision, "one") for name in STAGES for precision in DTYPES])
    run(folder, [entry(folder, teacher, *case) for case in CASES])
    return folder


def entry(folder, teacher, name, precision, strategy, called=None, **settings):
    settings = STAGES[name] | {"accelerator": "gpu", "precision": precision, "compile": "never"} | settings
    if name == "distill":
        settings["load_model"] = str(folder / "align-fp32-one")
    if strategy == "one":
        settings |= {"devices": 1, "micro_bsz": 2 * settings.get("micro_bsz", 4)}
    else:
        settings |= {"strategy": strategy, "ds_bucket_mb": 1}
    called = called or f"{name}-{precision}-{strategy}"
    return {"keys": stages.keys(folder, teacher, name, called, **settings)}


def assert_alike(folder, expected, found, dtype):
    largest, mean = TRAJECTORY_GPU[dtype]
    pairs = list(zip(curve(folder, expected), curve(folder, found), strict=True))
    drift = [abs(b / a - 1) for a, b in pairs]
    assert len(drift) == 30
    assert max(drift) < largest
    assert sum(drift) / 30 < mean


@pytest.mark.parametrize(("name", "precision", "strategy"), CASES)
def test_the_curves_are_one_gpus(folder, name, precision, strategy):
    assert_alike(folder, f"{name}-{precision}-one", f"{name}-{precision}-{strategy}", DTYPES[precision])
    weights = load_file(folder / f"{name}-{precision}-{strategy}" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_stopped_run_goes_on(folder, teacher):
    stopped = entry(folder, teacher, "distill", "bf16", "deepspeed_stage_2", "stopped")
    run(folder, [stopped | {"stop": [1, 6]}], code=128 + signal.SIGTERM)
    out, _ = run(folder, [stopped])
    assert "going on after step 7 of 30" in out
    assert_alike(folder, "distill-bf16-deepspeed_stage_2", "stopped", torch.bfloat16)


def test_blocks_are_compiled_and_deepspeeds_adam_updates(folder, teacher):
    # Builds a CUDA extension and compiles graphs: a minute or two
    settings = {"compile": "always", "optimizer": "dsfusedadamw", "activation_checkpointing": "full"}
    run(folder, [entry(folder, teacher, "distill", "bf16", "deepspeed_stage_2", "compiled", **settings)])
    assert_alike(folder, "distill-bf16-one", "compiled", torch.bfloat16)
