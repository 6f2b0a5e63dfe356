"""A stage from start to finished folder: trajectories, contents, refusals."""

import csv
import json
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from radlads.checkpoint.manifest import read_manifest
from radlads.checkpoint.model_folder import load_model
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.data.loader import HeldoutWindows
from radlads.distill.heldout import measure
from radlads.model import block, rad_rwkv7
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.swiglu import SwiGLU
from radlads.train import hardware, trainer
from radlads.train.engines.single import SingleProcess
from radlads.train.engines.table import engine_for
from radlads.train.fit import run_stage
from radlads.train.hardware import resolve_precision
from radlads.train.lightning_module import StageModule
from radlads.train.processes.group import ALONE, Processes

PAIR = Processes(0, 2)


def run(teacher, data, folder, stage="distill", student=None, **overrides):
    keys = {f"train.{key}": value for key, value in overrides.items()}
    config = tiny.stage_config(data, stage, **keys)
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = student or build_student(source, config.model)[0]
    console = tiny.Silent()
    result = run_stage(config, student, build_teacher(source), folder, console, parent="test")
    return result, student, console


def curve(folder, key="loss"):
    with (folder / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_accumulating_eight_of_one_is_one_of_eight(teacher, corpus_folder, tmp_path, stage):
    budget = {"my_exit_tokens": 16 * 8 * 10}
    _, one, _ = run(teacher, corpus_folder, tmp_path / "1x8", stage, micro_bsz=1, accumulate_grad_batches=8, **budget)
    _, eight, _ = run(teacher, corpus_folder, tmp_path / "8x1", stage, micro_bsz=8, accumulate_grad_batches=1, **budget)
    for key in ("loss", "grad_norm"):
        drift = torch.tensor(curve(tmp_path / "1x8", key)) / torch.tensor(curve(tmp_path / "8x1", key)) - 1
        assert len(drift) == 10
        assert drift.abs().mean() < 1e-5
    for a, b in zip(one.parameters(), eight.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_the_same_run_twice_is_bit_equal(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "a")
    run(teacher, corpus_folder, tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_a_stage_learns(teacher, corpus_folder, tmp_path, stage):
    run(teacher, corpus_folder, tmp_path / "run", stage, my_exit_tokens=16 * 4 * 60, lr_init=5e-3)
    losses = curve(tmp_path / "run")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_gradient_checkpointing_recomputes_and_changes_nothing(teacher, corpus_folder, tmp_path, monkeypatch):
    calls, forward = [0, 0], SwiGLU.forward
    for switch in (0, 1):

        def counted(self, x, switch=switch):
            calls[switch] += 1
            return forward(self, x)

        monkeypatch.setattr(SwiGLU, "forward", counted)
        run(teacher, corpus_folder, tmp_path / str(switch), "extend", grad_cp=switch)
    assert calls[1] == 2 * calls[0]
    assert curve(tmp_path / "0") == pytest.approx(curve(tmp_path / "1"), rel=1e-6)


def test_bf16_follows_fp32(teacher, corpus_folder, tmp_path):
    for precision in ("fp32", "bf16"):
        run(teacher, corpus_folder, tmp_path / precision, precision=precision)
    assert curve(tmp_path / "bf16") == pytest.approx(curve(tmp_path / "fp32"), rel=0.02)
    assert curve(tmp_path / "bf16") != curve(tmp_path / "fp32")


def test_clipping_bounds_what_is_applied_and_not_what_is_logged(teacher, corpus_folder, tmp_path):
    for clip in (1e-6, 0.0):
        run(teacher, corpus_folder, tmp_path / str(clip), gradient_clip_val=clip, my_exit_tokens=64)
    assert curve(tmp_path / "1e-06", "grad_norm") == curve(tmp_path / "0.0", "grad_norm")


def test_a_finished_folder_holds_all_that_is_promised(teacher, corpus_folder, tmp_path):
    folder = tmp_path / "run"
    keys = {"validation_data_file": str(corpus_folder / "heldout"), "heldout_tokens": 640, "heldout_every_steps": 2}
    result, student, console = run(teacher, corpus_folder, folder, "align", **keys)
    manifest = read_manifest(folder)
    assert manifest["stage"] == "align"
    assert manifest["parent"] == "test"
    assert manifest["tokens"] == result.tokens == 16 * 4 * 5
    assert (
        manifest["versions"]["torch"] == torch.__version__.split("+")[0]
        or manifest["versions"]["torch"] == torch.__version__
    )
    assert manifest["heldout"]["num_tokens"] == 640
    assert {"config.yaml", "config.json", "model.safetensors", "metrics.csv", "tensorboard"} <= {
        p.name for p in folder.iterdir()
    }
    with (folder / "heldout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    assert all(curve(folder, f"layer_{layer}") for layer in range(3))
    assert any("tok/s" in line and "left" in line for line in console.lines)
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(load_model(folder)(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize("optimizer", ["adamw", "adamwschedulefree"])
def test_what_is_written_is_what_was_measured(teacher, corpus_folder, tmp_path, optimizer):
    if optimizer == "adamwschedulefree":
        pytest.importorskip("schedulefree")
    keys = {"validation_data_file": str(corpus_folder / "heldout"), "heldout_tokens": 640, "heldout_every_steps": 2}
    result, student, _ = run(teacher, corpus_folder, tmp_path / "run", optimizer=optimizer, **keys)
    windows = DataLoader(HeldoutWindows(BinIdxReader(corpus_folder / "heldout"), 16, 640), batch_size=4)
    for model in (student, load_model(tmp_path / "run")):
        assert measure(model, None, windows).loss == pytest.approx(result.heldout.loss, rel=1e-6)


def test_the_mean_over_layers_is_the_loss(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "run", "align")
    layers = [curve(tmp_path / "run", f"layer_{layer}") for layer in range(3)]
    assert [sum(values) / 3 for values in zip(*layers, strict=True)] == pytest.approx(curve(tmp_path / "run"), rel=1e-5)


def test_a_non_finite_loss_stops_the_stage_and_leaves_no_finished_folder(teacher, corpus_folder, tmp_path):
    config = tiny.stage_config(corpus_folder, "distill")
    student, _ = build_student(open_teacher(teacher), config.model)
    student.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"loss of distill .* is nan at step 1"):
        run(teacher, corpus_folder, tmp_path / "run", student=student)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial" / "manifest.json").exists()


def test_an_existing_folder_is_never_touched(teacher, corpus_folder, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        run(teacher, corpus_folder, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_tampered_weights_are_noticed(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "run", my_exit_tokens=64)
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    for read in (read_manifest, load_model):
        with pytest.raises(ValueError, match="not the file its manifest"):
            read(tmp_path / "run")


def test_a_damaged_manifest_is_noticed(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "align"}))
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data_file": ""}, "data_file is not set"),
        ({"data_file": "/no/such/corpus"}, "/no/such/corpus"),
        ({"accelerator": "gpu"}, "no CUDA GPU is here"),
        ({"magic_prime": 15}, "15"),
        ({"devices": 2}, "ask for 2 processes, but 1 runs: use radlads train, which starts them"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_settings_that_cannot_run_are_refused(teacher, corpus_folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(teacher, corpus_folder, tmp_path / "run", **overrides)


def test_distilling_without_a_teacher_is_refused(teacher, corpus_folder, tmp_path):
    config = tiny.stage_config(corpus_folder, "distill")
    student, _ = build_student(open_teacher(teacher), config.model)
    with pytest.raises(ValueError, match="needs a teacher"):
        run_stage(config, student, None, tmp_path / "run", tiny.Silent(), parent="test")


def test_a_corpus_beyond_the_vocabulary_is_refused_before_training(tmp_path, teacher, corpus_folder):
    small = tiny.teacher_folder(tmp_path / "small", vocab_size=200)
    with pytest.raises(ValueError, match="outside the model's vocabulary of 200"):
        run(small, corpus_folder, tmp_path / "run")
    assert not (tmp_path / "run.partial").exists()


def test_precision_auto_is_fp32_or_bf16_and_the_rest_is_kept():
    assert resolve_precision("auto", "cuda") == "bf16"
    assert resolve_precision("auto", "cpu") in ("bf16", "fp32")
    assert resolve_precision("32", "cpu") == "32"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_is_never_applied(teacher, corpus_folder, tmp_path, optimizer):
    config = tiny.stage_config(corpus_folder, "distill")
    student, _ = build_student(open_teacher(teacher), config.model)
    student.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    with pytest.raises(ValueError, match=r"gradient of distill is (inf|nan) at step 1"):
        run(teacher, corpus_folder, tmp_path / "run", student=student, optimizer=optimizer)
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


def test_the_part_that_is_not_finite_is_named(teacher, corpus_folder, tmp_path):
    config = tiny.stage_config(corpus_folder, "align")
    student, _ = build_student(open_teacher(teacher), config.model)
    student.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"loss of align \(layer_1\) is nan at step 1"):
        run(teacher, corpus_folder, tmp_path / "run", "align", student=student)


def test_with_bf16_weights_a_stage_learns_and_writes_bf16(teacher, corpus_folder, tmp_path):
    keys = {"my_exit_tokens": 16 * 4 * 60, "lr_init": 5e-3}
    _, student, _ = run(teacher, corpus_folder, tmp_path / "run", precision="bf16-true", **keys)
    losses = curve(tmp_path / "run")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    run(teacher, corpus_folder, tmp_path / "next", "extend", student=student)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "stays"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_left_in_bf16_still_teaches(teacher, corpus_folder, tmp_path, precision, stays):
    config = tiny.stage_config(corpus_folder, "align", **{"train.precision": precision})
    source = open_teacher(teacher)
    student, frozen = build_student(source, config.model)[0], build_teacher(source, dtype=torch.bfloat16)
    run_stage(config, student, frozen, tmp_path / "run", tiny.Silent(), parent="test")
    assert frozen.dtype == stays


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_bf16_weights_keep_rotation_and_decay_in_fp32(teacher, corpus_folder, tmp_path, monkeypatch, stage):
    seen = set()
    rwkv7 = rad_rwkv7.rwkv7

    def watched(r, log_w, *rest):
        seen.add(log_w.dtype)
        return rwkv7(r, log_w, *rest)

    monkeypatch.setattr(rad_rwkv7, "rwkv7", watched)
    _, student, _ = run(teacher, corpus_folder, tmp_path / "run", stage, precision="bf16-true", my_exit_tokens=64)
    shared = student.model.shared_inputs(torch.zeros(1, 5, 64, dtype=torch.bfloat16), None, None, None)
    assert seen == {torch.float32}
    assert (shared.cos.dtype, shared.sin.dtype) == (torch.float32, torch.float32)


def test_too_little_gpu_memory_says_what_to_lower(teacher, corpus_folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StageModule, "training_step", full)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    with pytest.raises(ValueError, match="does not fit into the GPU's 80 GB") as caught:
        run(teacher, corpus_folder, tmp_path / "run")
    for remedy in ("train.micro_bsz (now 4", "model.ctx_len (now 16)", "activation_checkpointing full", "bf16-true"):
        assert remedy in str(caught.value)


def test_compiling_always_compiles_while_the_stage_runs(teacher, corpus_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(block, "_compiled", lambda function, backend: asked.append(backend) or function)
    run(teacher, corpus_folder, tmp_path / "never", compile="never", my_exit_tokens=64)
    assert asked == []
    _, student, _ = run(teacher, corpus_folder, tmp_path / "always", compile="always", my_exit_tokens=64)
    assert set(asked) == {"inductor"}
    assert all(block.compile_backend is None for block in student.model.layers)
    assert (tmp_path / "never/model.safetensors").read_bytes() == (tmp_path / "always/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stage", "settings", "advice"),
    [
        ("deepspeed_stage_2", {}, "{full} or train.strategy fsdp and {bf16} and {full}"),
        ("deepspeed_stage_3", {}, "{full} or train.strategy fsdp and {bf16} and {full}"),
        ("deepspeed_stage_3", {"attention_distillation_stage": 1}, "train.strategy fsdp and {bf16}"),
        ("deepspeed_stage_2", {"grad_cp": 1, "teacher_precision": "fp8"}, "train.strategy fsdp and {bf16} and {same}"),
    ],
)
def test_deepspeed_is_told_what_it_or_fsdp_takes(tmp_path, monkeypatch, stage, settings, advice):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    keys = {f"train.{key}": value for key, value in {"strategy": stage, **settings}.items()}
    config = tiny.stage_config(tmp_path, "distill", **keys)
    said = hardware.out_of_memory(config, engine_for(config.train, PAIR), torch.device("cuda"), graphed=False)
    words = {"full": "activation_checkpointing full", "bf16": "precision bf16-true", "same": "teacher_precision same"}
    assert said.endswith(", or set " + advice.format(**{name: f"train.{text}" for name, text in words.items()}))


def test_auto_compiles_on_cuda_with_triton_alone(tmp_path, monkeypatch):
    cuda, train = torch.device("cuda"), tiny.stage_config(tmp_path, "distill", **{"train.compile": "auto"}).train
    for triton in (True, False):
        monkeypatch.setattr(hardware, "has_triton", lambda device, triton=triton: triton)
        assert hardware.compiles(train, cuda) is triton
        assert not hardware.compiles(train, torch.device("cpu"))


def test_a_gpu_without_bf16_is_refused_and_auto_goes_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (7, 5))
    assert resolve_precision("auto", "cuda") == "fp32"
    for precision in ("bf16", "bf16-true", "bf16-mixed"):
        train = tiny.stage_config(tmp_path, "align", **{"train.precision": precision, "train.accelerator": "gpu"}).train
        with pytest.raises(ValueError, match=r"compute capability 7\.5.*--train\.precision fp32"):
            trainer.build_trainer(train, tmp_path, [], SingleProcess(train, ALONE))


def test_lightning_takes_no_signal_and_asks_no_process_for_one(tmp_path, monkeypatch):
    """It would ask before every micro-batch, and wait for the GPU to hear the answer."""
    asked = []
    train = tiny.stage_config(tmp_path, "align").train
    lightnings = trainer.build_trainer(train, tmp_path, [], SingleProcess(train, ALONE))
    loop, connector = lightnings.fit_loop.epoch_loop, lightnings._signal_connector
    assert "register_signal_handlers" in vars(type(connector))
    before = signal.getsignal(signal.SIGTERM)
    connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *arguments, **more: asked.append(arguments))
    assert "_broadcast_sigterm_tensor" in vars(type(loop))
    loop._broadcast_sigterm_tensor()
    assert not asked


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_recomputes_what_it_says(teacher, corpus_folder, tmp_path, monkeypatch, mode):
    calls = {"mixer": 0, "mlp": 0}
    for kind, cls in (("mixer", RadRwkv7), ("mlp", SwiGLU)):
        forward = cls.forward

        def counted(self, *arguments, kind=kind, forward=forward):
            calls[kind] += 1
            return forward(self, *arguments)

        monkeypatch.setattr(cls, "forward", counted)
    run(teacher, corpus_folder, tmp_path / "run", "extend", activation_checkpointing=mode)
    once = 5 * 3
    assert calls == {"mixer": 2 * once, "mlp": (2 if mode == "full" else 1) * once}


def test_ctrl_c_arrives_as_what_it_is(teacher, corpus_folder, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("radlads.train.lightning_module.set_learning_rates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, corpus_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_count_optimizer_steps_under_accumulation(teacher, corpus_folder, tmp_path):
    keys = {"accumulate_grad_batches": 4, "micro_bsz": 1, "log_every_n_steps": 2, "my_exit_tokens": 16 * 4 * 6}
    run(teacher, corpus_folder, tmp_path / "run", **keys)
    assert curve(tmp_path / "run", "optimizer_step") == [2, 4, 6]


def test_a_stage_shorter_than_the_logging_interval_has_metrics(teacher, corpus_folder, tmp_path):
    run(teacher, corpus_folder, tmp_path / "run", log_every_n_steps=50, my_exit_tokens=64)
    assert len(curve(tmp_path / "run")) == 1
