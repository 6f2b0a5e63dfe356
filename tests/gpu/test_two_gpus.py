"""ddp and fsdp with NCCL: two GPUs make the steps that one makes of twice the batch."""

import pytest
import stages
import tiny
from launch import run
from two_gpus import DTYPES, assert_alike, entry, needs_two_gpus

pytestmark = [pytest.mark.gpu, needs_two_gpus, pytest.mark.timeout(600)]

ACCUMULATED = {"micro_bsz": 2, "accumulate_grad_batches": 2}
GRAPHED = {"cuda_graphs": "always"}
# name: stage, precision, strategy, settings
RUNS = {
    "align-graphed": ("align", "fp32", "ddp", GRAPHED),
    "align-bf16": ("align", "bf16", "fsdp", {}),
    "distill": ("distill", "fp32", "ddp", {}),
    "distill-graphed": ("distill", "fp32", "ddp", GRAPHED),
    "distill-graphed-accumulated": ("distill", "fp32", "ddp", GRAPHED | ACCUMULATED),
    "distill-graphed-recomputed": ("distill", "bf16", "ddp", GRAPHED | {"activation_checkpointing": "full"}),
    "distill-fsdp": ("distill", "fp32", "fsdp", ACCUMULATED),
    "distill-fsdp-bf16": ("distill", "bf16", "fsdp", {"activation_checkpointing": "selective"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs; `one-STAGE-PRECISION` is a single GPU, which records no graph."""
    folder = stages.corpus(tmp_path_factory.mktemp("two"))
    teacher = tiny.teacher_folder(tmp_path_factory.mktemp("teacher"), heads=1)  # of 64 channels, as kernels have them
    start = {"align": {}, "distill": {"load_model": str(folder / "one-align-fp32")}}
    whole = dict.fromkeys((stage, precision) for stage, precision, _, _ in RUNS.values())
    alone = [
        entry(folder, teacher, *each, "one", f"one-{'-'.join(each)}", cuda_graphs="never", **start[each[0]])
        for each in whole
    ]
    run(folder, alone)
    both = [
        entry(folder, teacher, stage, precision, strategy, name, **settings, **start[stage])
        for name, (stage, precision, strategy, settings) in RUNS.items()
    ]
    run(folder, both)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_curves_are_one_gpus(folder, name):
    stage, precision, _, _ = RUNS[name]
    assert_alike(folder, f"one-{stage}-{precision}", name, DTYPES[precision], ("loss", "grad_norm"))
