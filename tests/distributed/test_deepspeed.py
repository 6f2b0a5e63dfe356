"""DeepSpeed's ZeRO in two processes: the steps that one process makes, and checkpoints that anyone goes on from."""

import importlib.util
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import stages
import torch
from launch import curve, run
from safetensors.torch import load_file
from tiny import stage_config
from tolerances import TRAJECTORY_MAX, TRAJECTORY_MEAN

from radlads.model.configuration import RadladsConfig
from radlads.train.engines import zero3
from radlads.train.engines.single import SingleProcess
from radlads.train.engines.table import engine_for
from radlads.train.processes.group import ALONE, Processes

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ZERO = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
STOPPED = ("deepspeed_stage_2", "deepspeed_stage_3")
ADAMS = ("adamw", "dsfusedadamw")  # whose state counts steps in tensors, and in numbers
SMALL_BUCKETS = {"ds_bucket_mb": 1}
ACCUMULATED = {"micro_bsz": 2, "accumulate_grad_batches": 2}
STAGES = {
    "align": {},
    "distill": {"activation_checkpointing": "none"},
    "distill-accumulated": ACCUMULATED | {"activation_checkpointing": "selective"},
    "distill-measured": ACCUMULATED | {"activation_checkpointing": "full", "heldout_every_steps": 7},
    "extend": {"trainable": "decay", "reset_state_at_eos": 1, "eos_token_id": stages.END},
    "instruct": {"on_policy_share": 0.5, "on_policy_max_tokens": 6, "on_policy_temperature": 0.0, "lr_init": 1e-4},
}
# Stage 3 takes five times as long: it gathers block by block
CASES = [("align", ZERO[0]), ("distill-accumulated", ZERO[0])]
CASES += [(name, ZERO[1]) for name in ("align", "distill-accumulated", "extend", "instruct")]
CASES += [(name, ZERO[2]) for name in ("align", "distill-measured", "extend", "instruct")]
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def ran(teacher, tmp_path_factory):
    """The folder of all runs, and what the processes of DeepSpeed's said."""
    folder = stages.corpus(tmp_path_factory.mktemp("zero"))
    run(folder, [entry(folder, teacher, name, "one") for name in STAGES])
    entries = [entry(folder, teacher, name, strategy) for name, strategy in CASES]
    entries += [bf16(folder, teacher, strategy, f"{strategy}-bf16") for strategy in ZERO]
    entries.append(fused(folder, teacher, "fused"))
    going_on = [bf16(folder, teacher, strategy, f"{strategy}-bf16-stopped") for strategy in STOPPED]
    going_on.append(fused(folder, teacher, "fused-stopped"))
    for optimizer in ADAMS:
        by_ddp, by_stage_3, by_stage_1 = (
            entry(folder, teacher, "distill-accumulated", strategy, f"handed-on-{optimizer}", optimizer=optimizer)
            for strategy in ("ddp", "deepspeed_stage_3", "deepspeed_stage_1")
        )
        entries.append(by_ddp | {"stop": [0, 6], "goes_on": True})
        entries += [by_stage_3 | {"stop": [0, 12], "goes_on": True}, by_stage_1]
    # The last to be stopped ends the program, and all that were go on in another
    entries += [each | {"stop": [1, 6], "goes_on": each is not going_on[-1]} for each in going_on]
    out, _ = by_zero(folder, entries, code=128 + signal.SIGTERM)
    entries = going_on
    rates = {"lr_init": 1e39, "lr_final": 1e39, "checkpoint_every_steps": 1}
    for strategy in STOPPED:
        diverging = entry(folder, teacher, "distill-accumulated", strategy, f"{strategy}-diverging", **rates)
        entries.append(diverging | {"fails": True})
    more, err = by_zero(folder, entries)
    return folder, out + more, err


@pytest.fixture(scope="module")
def folder(ran):
    """`one-NAME`, `STRATEGY-NAME`, STRATEGY-bf16, and those that `ran` names."""
    return ran[0]


def by_zero(folder, entries, code=0):
    return run(folder, [each | {"deepspeed_on_cpu": True} for each in entries], code=code)


def entry(folder, teacher, name, strategy, called=None, **settings):
    stage, settings = name.partition("-")[0], STAGES[name] | SMALL_BUCKETS | settings
    if name.endswith("measured"):
        settings |= {"validation_data_file": str(folder / "train"), "heldout_tokens": 512}
    if stage != "align":
        settings["load_model"] = str(folder / "one-align")
    if strategy == "one":
        settings |= {"devices": 1, "micro_bsz": 2 * settings.get("micro_bsz", 4)}
    else:
        settings["strategy"] = strategy
    return {"keys": stages.keys(folder, teacher, stage, called or f"{strategy}-{name}", **settings)}


def bf16(folder, teacher, strategy, called):
    return entry(folder, teacher, "distill", strategy, called, precision="bf16")


def fused(folder, teacher, called):
    """Updated by DeepSpeed's fused Adam, or rather by what stands in for it on a CPU."""
    return entry(folder, teacher, "distill-accumulated", "deepspeed_stage_2", called, optimizer="dsfusedadamw")


def drift(folder, expected, found, column="loss"):
    pairs = zip(curve(folder, expected, column), curve(folder, found, column), strict=True)
    return [abs(b / a - 1) for a, b in pairs]


@needs_deepspeed
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_curves_are_one_processs(folder, name, strategy):
    for column in ("loss", "grad_norm"):
        found = drift(folder, f"one-{name}", f"{strategy}-{name}", column)
        assert len(found) == stages.STEPS
        assert max(found) < TRAJECTORY_MAX
        assert sum(found) / stages.STEPS < TRAJECTORY_MEAN


@pytest.fixture(scope="module")
def compiled(folder, teacher):
    """The same folder, with a run whose blocks are compiled and recomputed: compiled."""
    settings = {"compile": "always", "activation_checkpointing": "full"}
    by_zero(folder, [entry(folder, teacher, "distill-measured", ZERO[2], "compiled", **settings)])
    return folder


@needs_deepspeed
@pytest.mark.slow
def test_compiled_and_recomputed_parts_make_the_same_curve(compiled):
    assert max(drift(compiled, "one-distill-measured", "compiled")) < TRAJECTORY_MAX
    assert curve(compiled, "compiled") != curve(compiled, f"{ZERO[2]}-distill-measured"), "nothing was compiled"


@needs_deepspeed
def test_graphs_have_torchs_linear(monkeypatch):
    """In those of torch 2.11 the gradients of DeepSpeed's are zero, which on this torch they may not be."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3._linear)
    layer, graphs = torch.nn.Linear(2, 2), []
    x = torch.ones(3, 2)

    def backend(graph, inputs):
        graphs.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    eager = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert type(layer(x).grad_fn).__name__ == "LinearFunctionForZeroStage3Backward"
    compiled = torch.autograd.grad(torch.compile(layer, backend=backend)(x).sum(), layer.weight)
    assert graphs == [torch._C._nn.linear]
    assert compiled[0].equal(eager[0])


BUFFERED = """
import torch
from radlads.model.rad_rwkv6 import RadRwkv6

class TMix_buffered(RadRwkv6):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.register_buffer("scale", torch.full((1,), 0.5))
        if SINGLE:
            self.single = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, *rest):
        return super().forward(x * self.scale, *rest)
"""


@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO[1:])
def test_a_users_mixer_may_have_buffers(teacher, tmp_path, monkeypatch, strategy):
    plug_in(tmp_path, monkeypatch, single=False)
    buffered = aligning(tmp_path, teacher, strategy, precision="bf16")
    by_zero(tmp_path, [buffered])
    run(tmp_path, [aligning(tmp_path, teacher, "one")])
    assert max(drift(tmp_path, "one", strategy)) < 0.01


@needs_deepspeed
def test_a_single_number_has_no_parts(teacher, tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, single=True)
    _, err = by_zero(tmp_path, [aligning(tmp_path, teacher, ZERO[2])], code=2)
    assert "single is a single number: set deepspeed_stage_2" in err


def plug_in(folder, monkeypatch, *, single):
    stages.corpus(folder)
    (folder / "tmix").mkdir()
    (folder / "tmix/tmix_buffered.py").write_text(BUFFERED.replace("SINGLE", str(single)))
    monkeypatch.syspath_prepend(folder)


def aligning(folder, teacher, strategy, **settings):
    spread = {"devices": 1, "micro_bsz": 8} if strategy == "one" else {"strategy": strategy, "ds_bucket_mb": 1}
    return {"keys": stages.keys(folder, teacher, "align", strategy, mixer="buffered", **spread, **settings)}


@needs_deepspeed
def test_measurements_in_between_are_one_processs(folder):
    expected, found = (
        np.loadtxt(folder / f"{strategy}-distill-measured/heldout.csv", delimiter=",", skiprows=1)
        for strategy in ("one", "deepspeed_stage_3")
    )
    assert len(expected) == stages.STEPS // 7 + 2
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
    trained = load_file(folder / f"{strategy}-bf16/model.safetensors")
    assert not any(trained[name].equal(before[name]) for name in trained)


@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_bf16_keeps_fp32_weights(folder, strategy):
    weights = load_file(folder / f"{strategy}-bf16/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in weights.values())
    assert json.loads((folder / f"{strategy}-bf16/config.json").read_text())["dtype"] == "float32"
    assert max(drift(folder, "one-distill", f"{strategy}-bf16")) < 0.01


@needs_deepspeed
@pytest.mark.parametrize("whole", ["deepspeed_stage_2-bf16", "deepspeed_stage_3-bf16", "fused"])
def test_a_run_goes_on_bit_for_bit(ran, whole):
    folder, out, _ = ran
    assert out.count(f"going on after step 7 of {stages.STEPS}") == 3 + len(ADAMS)
    expected, found = (load_file(folder / name / "model.safetensors") for name in (whole, f"{whole}-stopped"))
    assert all(expected[name].equal(found[name]) for name in expected)
    assert curve(folder, whole) == curve(folder, f"{whole}-stopped")


@needs_deepspeed
@pytest.mark.parametrize("optimizer", ADAMS)
def test_a_run_goes_on_under_another_strategy(ran, optimizer):
    """Begun by ddp, gone on with by stage 3, and ended by stage 1."""
    folder, out, _ = ran
    assert out.count(f"going on after step 13 of {stages.STEPS}") == len(ADAMS)
    assert max(drift(folder, "one-distill-accumulated", f"handed-on-{optimizer}")) < TRAJECTORY_MAX


@needs_deepspeed
def test_deepspeeds_adam_makes_adams_steps(folder):
    assert max(drift(folder, "one-distill-accumulated", "fused")) < TRAJECTORY_MAX


@needs_deepspeed
@pytest.mark.parametrize("strategy", STOPPED)
def test_a_step_that_is_not_finite_reaches_no_checkpoint(ran, strategy):
    folder, _, err = ran
    said = "the loss of distill (loss) is nan at step 2, and the first tensor that is not finite is the weight model."
    assert err.count(said) == 2 * len(STOPPED), "each process says so"
    checkpoints = folder / f"{strategy}-diverging.partial/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]


GPUS = Processes(0, 2, torch.device("cuda", 0))
STUDENT = RadladsConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16-true"}, "bf16-true .*set fsdp"),
        ({"spike_factor": 3.0}, "spike_factor .*set ddp or fsdp"),
        ({"optimizer": "muon"}, "optimizer muon .*set ddp"),
        ({"strategy": "deepspeed_stage_3", "teacher_precision": "fp8"}, "fp8 .*set deepspeed_stage_2"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(tmp_path, settings, message):
    train = replace(stage_config(tmp_path, "distill").train, **{"strategy": "deepspeed_stage_2"} | settings)
    with pytest.raises(ValueError, match=message):
        engine_for(train, GPUS).check(STUDENT)


@pytest.mark.parametrize("strategy", ZERO)
def test_compiling_and_recomputing_are_not_refused(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    train = stage_config(tmp_path, "distill").train
    engine_for(replace(train, strategy=strategy, compile="always", grad_cp=1), GPUS).check(STUDENT)


def test_a_cpu_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    train = replace(stage_config(tmp_path, "distill").train, strategy="deepspeed_stage_1")
    with pytest.raises(ValueError, match="needs CUDA GPUs: set ddp or fsdp"):
        engine_for(train, Processes(0, 2, torch.device("cpu"))).check(STUDENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'radlads\[deepspeed\]'"):
        engine_for(train, GPUS).check(STUDENT)
    assert isinstance(engine_for(train, ALONE), SingleProcess)
