"""DeepSpeed's ZeRO on two GPUs: the steps that one GPU makes of twice the batch, in fp32 and bf16."""

import importlib.util
import signal

import pytest
import stages
import tiny
import torch
import two_gpus
from launch import curve, run
from safetensors.torch import load_file
from two_gpus import DTYPES, assert_alike, needs_two_gpus

pytestmark = [
    pytest.mark.gpu,
    needs_two_gpus,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
STAGES = {"align": {}, "distill": {"micro_bsz": 2, "accumulate_grad_batches": 2}}
ZERO_3 = "deepspeed_stage_3"
# Every pair of two is there; a start takes most of a run's time
CASES = [
    ("align", "fp32", "deepspeed_stage_1"),
    ("align", "bf16", "deepspeed_stage_2"),
    ("distill", "fp32", "deepspeed_stage_2"),
    ("distill", "bf16", "deepspeed_stage_1"),
    ("distill", "bf16", "deepspeed_stage_2"),
    ("align", "bf16", ZERO_3),
    ("distill", "fp32", ZERO_3),
    ("distill", "bf16", ZERO_3),
]
ONE_CASE = ("distill", "bf16", "deepspeed_stage_2")
COMPILED = [ONE_CASE, ("distill", "fp32", ZERO_3), ("distill", "bf16", ZERO_3), ("align", "bf16", ZERO_3)]
STOPPED = {"stopped": {}, "fused-stopped": {"optimizer": "dsfusedadamw"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One head of 64 channels, as kernels have them."""
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"), heads=1)


@pytest.fixture(scope="module")
def ran(teacher, tmp_path_factory):
    """The folder of all runs, and what the two processes said where those that were stopped went on."""
    folder = stages.corpus(tmp_path_factory.mktemp("zero"))
    run(folder, [entry(folder, teacher, name, precision, "one") for name in STAGES for precision in DTYPES])
    entries = [entry(folder, teacher, *case) for case in CASES]
    entries.append(entry(folder, teacher, *ONE_CASE, "fused", optimizer="dsfusedadamw"))
    resumed = [entry(folder, teacher, *ONE_CASE, called, **settings) for called, settings in STOPPED.items()]
    entries += [each | {"stop": [1, 6], "goes_on": each is not resumed[-1]} for each in resumed]
    run(folder, entries, code=128 + signal.SIGTERM)
    return folder, run(folder, resumed)[0]


@pytest.fixture(scope="module")
def folder(ran):
    """Runs are NAME-PRECISION-STRATEGY, with `one` for a single GPU, and those that `ran` names."""
    return ran[0]


def entry(folder, teacher, name, precision, strategy, called=None, **settings):
    settings = STAGES[name] | {"ds_bucket_mb": 1} | settings
    if name == "distill":
        settings["load_model"] = str(folder / "align-fp32-one")
    called = called or f"{name}-{precision}-{strategy}"
    return two_gpus.entry(folder, teacher, name, precision, strategy, called, **settings)


@pytest.mark.parametrize(("name", "precision", "strategy"), CASES)
def test_the_curves_are_one_gpus(folder, name, precision, strategy):
    assert_alike(folder, f"{name}-{precision}-one", f"{name}-{precision}-{strategy}", DTYPES[precision])
    weights = load_file(folder / f"{name}-{precision}-{strategy}" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("whole", "stopped"), [("distill-bf16-deepspeed_stage_2", "stopped"), ("fused", "fused-stopped")]
)
def test_a_stopped_run_goes_on(ran, whole, stopped):
    folder, out = ran
    assert out.count("going on after step 7 of 30") == len(STOPPED)
    assert_alike(folder, whole, stopped, torch.bfloat16)


def test_deepspeeds_adam_makes_adams_steps(folder):
    assert_alike(folder, "distill-bf16-one", "fused", torch.bfloat16)


@pytest.fixture(scope="module")
def compiled(folder, teacher):
    """The same folder, with runs whose blocks are compiled and recomputed: compiled-NAME-PRECISION-STRATEGY."""
    settings = {"compile": "always", "activation_checkpointing": "full"}
    run(folder, [entry(folder, teacher, *case, "-".join(("compiled", *case)), **settings) for case in COMPILED])
    return folder


@pytest.mark.parametrize(("name", "precision", "strategy"), COMPILED)
def test_blocks_are_compiled_and_recomputed(compiled, name, precision, strategy):
    found = f"compiled-{name}-{precision}-{strategy}"
    assert_alike(compiled, f"{name}-{precision}-one", found, DTYPES[precision])
    assert curve(compiled, found) != curve(compiled, f"{name}-{precision}-{strategy}"), "nothing was compiled"
