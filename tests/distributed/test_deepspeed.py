"""DeepSpeed's ZeRO in two processes: the steps that one process makes, and checkpoints that anyone goes on from."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import stages
import torch
from launch import curve, run
from safetensors.torch import load_file
from tiny import stage_config
from tolerances import TRAJECTORY_MAX, TRAJECTORY_MEAN

from radlads.train.deepspeed_engine import check_engine, uses_engine
from radlads.train.processes import ALONE, Processes

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ZERO = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
SMALL_BUCKETS = {"ds_bucket_mb": 1}
STAGES = {
    "align": {},
    "distill-accumulated": {"micro_bsz": 2, "accumulate_grad_batches": 2, "activation_checkpointing": "selective"},
    "extend": {"trainable": "decay", "mask_labels_at_eos": 1, "eos_token_id": stages.END},
}
MEASURED = {"heldout_tokens": 512, "heldout_every_steps": 7, "activation_checkpointing": "full"}
STAGES_IN_PARTS = {
    "align-measured": MEASURED,
    "distill-measured": MEASURED,
    "distill": {"activation_checkpointing": "none"},
}
CASES = [(name, strategy) for name in STAGES for strategy in ZERO]
CASES += [(name, "deepspeed_stage_3") for name in STAGES_IN_PARTS]
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """The folder of all runs: `one-NAME` and `STRATEGY-NAME`, and STRATEGY-bf16."""
    folder = stages.corpus(tmp_path_factory.mktemp("zero"))
    run(folder, [entry(folder, teacher, name, "one") for name in STAGES | STAGES_IN_PARTS])
    whole = [entry(folder, teacher, name, strategy) for name, strategy in CASES]
    by_zero(folder, [*whole, *(bf16(folder, teacher, strategy, f"{strategy}-bf16") for strategy in ZERO)])
    return folder


def by_zero(folder, entries, code=0):
    return run(folder, [each | {"deepspeed_on_cpu": True} for each in entries], code=code)


def entry(folder, teacher, name, strategy, called=None, **settings):
    stage, settings = name.partition("-")[0], (STAGES | STAGES_IN_PARTS)[name] | SMALL_BUCKETS | settings
    if name.endswith("measured"):
        settings["validation_data_file"] = str(folder / "train")
    if stage != "align":
        settings["load_model"] = str(folder / "one-align")
    if strategy == "one":
        settings |= {"devices": 1, "micro_bsz": 2 * settings.get("micro_bsz", 4)}
    else:
        settings["strategy"] = strategy
    return {"keys": stages.keys(folder, teacher, stage, called or f"{strategy}-{name}", **settings)}


def bf16(folder, teacher, strategy, called):
    return entry(folder, teacher, "distill-accumulated", strategy, called, precision="bf16")


def drift(folder, expected, found, column="loss"):
    pairs = zip(curve(folder, expected, column), curve(folder, found, column), strict=True)
    return [abs(b / a - 1) for a, b in pairs]


@needs_deepspeed
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_curves_are_one_processs(folder, name, strategy):
    for column in ("loss", "grad_norm"):
        found = drift(folder, f"one-{name}", f"{strategy}-{name}", column)
        assert len(found) == 30
        assert max(found) < TRAJECTORY_MAX
        assert sum(found) / 30 < TRAJECTORY_MEAN


@needs_deepspeed
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_measurements_in_between_are_one_processs(folder, stage):
    expected, found = (
        np.loadtxt(folder / f"{strategy}-{stage}-measured/heldout.csv", delimiter=",", skiprows=1)
        for strategy in ("one", "deepspeed_stage_3")
    )
    assert len(expected) == 6
    np.testing.assert_allclose(found, expected, rtol=TRAJECTORY_MAX)


@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_frozen_weights_are_bit_equal_and_trained_ones_are_not(folder, strategy):
    before, after = (
        load_file(folder / "one-align/model.safetensors"),
        load_file(folder / f"{strategy}-align/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before if ".self_attn." not in name)
    trained = load_file(folder / f"{strategy}-distill-accumulated/model.safetensors")
    assert not any(trained[name].equal(before[name]) for name in trained)


@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_bf16_keeps_fp32_weights(folder, strategy):
    weights = load_file(folder / f"{strategy}-bf16/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in weights.values())
    assert json.loads((folder / f"{strategy}-bf16/config.json").read_text())["dtype"] == "float32"
    assert max(drift(folder, "one-distill-accumulated", f"{strategy}-bf16")) < 0.01


@pytest.fixture(scope="module")
def ends(folder, teacher):
    """What is said where runs that were stopped go on, and then one diverges."""
    stopped = [bf16(folder, teacher, strategy, f"{strategy}-stopped") for strategy in ZERO[1:]]
    run(folder, [entry(folder, teacher, "distill-accumulated", "ddp", "handed-on") | {"stop": [0, 6]}], code=143)
    handed = [entry(folder, teacher, "distill-accumulated", strategy, "handed-on") for strategy in (ZERO[2], ZERO[0])]
    handed_over = handed[0] | {"stop": [0, 12]}
    by_zero(folder, [each | {"stop": [1, 6], "goes_on": True} for each in stopped] + [handed_over], code=143)
    rates = {"lr_init": 1e25, "lr_final": 1e25, "checkpoint_every_steps": 1}
    diverging = [entry(folder, teacher, "distill-accumulated", each, f"{each}-diverging", **rates) for each in ZERO[1:]]
    out, err = by_zero(folder, [*stopped, handed[1], diverging[0]], code=2)
    return out, err, by_zero(folder, diverging[1:], code=2)[1]


@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO[1:])
def test_a_run_goes_on_bit_for_bit(folder, ends, strategy):
    assert ends[0].count("going on after step 7 of 30") == 2
    kinds = ("bf16", "stopped")
    expected, found = (load_file(folder / f"{strategy}-{kind}" / "model.safetensors") for kind in kinds)
    assert all(expected[name].equal(found[name]) for name in expected)
    assert curve(folder, f"{strategy}-bf16") == curve(folder, f"{strategy}-stopped")


@needs_deepspeed
def test_a_run_goes_on_under_another_strategy(folder, ends):
    """Begun by ddp, gone on with by stage 3, and ended by stage 1."""
    assert "going on after step 13 of 30" in ends[0]
    assert max(drift(folder, "one-distill-accumulated", "handed-on")) < TRAJECTORY_MAX


@needs_deepspeed
def test_a_step_that_is_not_finite_reaches_no_checkpoint(folder, ends):
    for strategy, err in zip(ZERO[1:], ends[1:], strict=True):
        assert "the loss of distill (loss) is nan at step 2, and the first tensor that is not finite is" in err
        checkpoints = folder / f"{strategy}-diverging.partial/checkpoints"
        assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]


GPUS = Processes(0, 2, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset_state_at_eos": 1}, "reset_state_at_eos 1 .*set ddp"),
        ({"precision": "bf16-true"}, "bf16-true .*set fsdp"),
        ({"spike_factor": 3.0}, "spike_factor .*set ddp or fsdp"),
        ({"optimizer": "muon"}, "optimizer muon .*set ddp"),
        ({"strategy": "deepspeed_stage_3", "teacher_precision": "fp8"}, "fp8 .*set deepspeed_stage_2"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(tmp_path, settings, message):
    train = replace(stage_config(tmp_path, "distill").train, **{"strategy": "deepspeed_stage_2"} | settings)
    with pytest.raises(ValueError, match=message):
        check_engine(train, GPUS)


def test_a_cpu_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    train = replace(stage_config(tmp_path, "distill").train, strategy="deepspeed_stage_1")
    with pytest.raises(ValueError, match="needs CUDA GPUs: set ddp or fsdp"):
        check_engine(train, Processes(0, 2, torch.device("cpu")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'radlads\[deepspeed\]'"):
        check_engine(train, GPUS)
    assert not uses_engine(train, ALONE)
