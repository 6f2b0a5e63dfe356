"""Stages of a tiny student on two GPUs and on one of them, started as tests/distributed starts its own."""

import pytest
import stages
import torch
from gpu_comparison import DRY_RUN
from launch import curve
from tolerances import TRAJECTORY_GPU

STEPS = 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
needs_two_gpus = pytest.mark.skipif(DRY_RUN or torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def entry(folder, teacher, stage, precision, strategy, name, **settings):
    """A run `name` of stages.py, not compiled; strategy "one" is a single GPU that takes both shares of a batch."""
    settings = {"accelerator": "gpu", "precision": precision, "compile": "never"} | settings
    if strategy == "one":
        settings |= {"devices": 1, "micro_bsz": 2 * settings.get("micro_bsz", 4)}
    else:
        settings |= {"strategy": strategy}
    return {"keys": stages.keys(folder, teacher, stage, name, **settings)}


def assert_alike(folder, expected, found, dtype, columns=("loss",)):
    """The curves of two runs, as far as their rounding lets them be."""
    largest, mean = TRAJECTORY_GPU[dtype]
    for column in columns:
        pairs = list(zip(curve(folder, expected, column), curve(folder, found, column), strict=True))
        drift = [abs(b / a - 1) for a, b in pairs]
        assert len(drift) == STEPS
        assert max(drift) < largest
        assert sum(drift) / STEPS < mean
