"""Training on a GPU: the same loss curves whatever computes them, no waiting for the device, memory that stays put."""

import functools
from pathlib import Path

import pytest
import torch
from gpu_comparison import DRY_RUN
from tolerances import FP8, TRAJECTORY_GPU, relative_error

from radlads.config.schema import TrainConfig
from radlads.distill import losses
from radlads.distill.fp8_teacher import Fp8Linear, fp8_copy
from radlads.distill.logits import build_stage
from radlads.distill.stage import is_trainable
from radlads.model import rad_rwkv6, rad_rwkv7, recurrence
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.cuda_graph import GraphedPasses
from radlads.train.optimizers.adamw import AdamW
from radlads.train.optimizers.optim import build_optimizers
from radlads.train.optimizers.step import backward_parts, optimizer_step
from radlads.train.spike_guard import SpikeGuard

pytestmark = pytest.mark.gpu

STEPS, BATCH, TOKENS, VOCAB = (50, 4, 65, 515) if not DRY_RUN else (12, 2, 20, 67)
STAGES = {"align": 1, "distill": 2, "extend": -1}
needs_gpu = pytest.mark.skipif(DRY_RUN, reason="says nothing without a GPU")


def model(mixer, device, dtype, layers=3, window=None):
    """A small model with heads that every kernel can take, the same weights at every call. window: its settings."""
    torch.manual_seed(1)
    config = RadladsConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        time_mixers=[mixer] * layers,
        mixer_settings={mixer: window} if window else {},
    )
    stack = RadladsForCausalLM(config)
    for parameter in stack.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return stack.to(device, dtype).train()


class Training:
    """A stage of student and teacher, step by step."""

    def __init__(
        self, stage, device, dtype, *, layers=3, checkpointing="none", compiled=False, mixer="rad_rwkv7", window=None
    ):
        self.student = model(mixer, device, dtype, layers, window)
        self.teacher = model("qwen2", device, dtype, layers).requires_grad_(False)
        train = TrainConfig(attention_distillation_stage=STAGES[stage], lr_init=1e-3)
        self.stage = build_stage(train)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(is_trainable(name, self.student, self.stage.trainable))
        self.student.set_activation_checkpointing(checkpointing)
        if compiled:
            self.student.compile_blocks()
            self.teacher.compile_blocks()
        self.optimizers = build_optimizers(self.student, train)
        self.guard = SpikeGuard(100.0, Path(), print)  # no loss here leaps so far
        generator = torch.Generator().manual_seed(4)
        walks = torch.randint(-3, 4, (STEPS, BATCH, TOKENS + 1), generator=generator).cumsum(-1) % VOCAB
        self.batches = walks.to(device)

    def step(self, number):
        """The loss of one step, on the device."""
        parts = backward_parts(self.stage, self.student, self.teacher, self.batches[number])
        count = sum(part.count for part in parts)
        loss = torch.stack([part.sum for part in parts]).sum() / count
        spike = self.guard.is_spike(loss)
        optimizer_step(self.optimizers, self.student.parameters(), count=count, clip_val=1.0, leave_out=spike)
        return loss

    def curve(self):
        return torch.stack([self.step(number) for number in range(STEPS)])


def assert_same_curve(found, expected, dtype):
    largest, mean = TRAJECTORY_GPU[dtype]
    drift = (found / expected - 1).abs()
    assert expected[-5:].mean() < 0.97 * expected[:5].mean(), "a curve that learns nothing shows nothing"
    assert drift.max() < largest
    assert drift.mean() < mean


def use_backend(monkeypatch, backend):
    monkeypatch.setattr(rad_rwkv7, "rwkv7", functools.partial(recurrence.rwkv7, backend=backend))
    monkeypatch.setattr(rad_rwkv6, "gla", functools.partial(recurrence.gla, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "fla"])
@pytest.mark.parametrize("mixer", ["rad_rwkv7", "rad_rwkv6"])
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_kernels_train_as_chunked_torch_does(device, monkeypatch, stage, mixer, backend, dtype):
    if reason := recurrence.missing(backend, torch.empty(1, 2, 1, 64, device=device)):
        pytest.skip(reason)
    use_backend(monkeypatch, "chunked")
    expected = Training(stage, device, dtype, mixer=mixer).curve()
    use_backend(monkeypatch, backend)
    assert_same_curve(Training(stage, device, dtype, mixer=mixer).curve(), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_no_curve(device, checkpointing, dtype):
    expected = Training("extend", device, dtype).curve()
    found = Training("extend", device, dtype, checkpointing=checkpointing).curve()
    assert_same_curve(found, expected, dtype)


@needs_gpu
@pytest.mark.parametrize(
    ("stage", "checkpointing", "dtype", "mixer"),
    [
        ("align", "none", torch.bfloat16, "rad_rwkv7"),
        ("distill", "none", torch.bfloat16, "rad_rwkv7"),
        ("extend", "selective", torch.bfloat16, "rad_rwkv7"),
        ("distill", "full", torch.float32, "rad_rwkv7"),
        ("distill", "none", torch.bfloat16, "rad_rwkv6"),
    ],
)
def test_compiling_changes_no_curve(device, stage, checkpointing, dtype, mixer):
    torch.compiler.reset()
    expected = Training(stage, device, dtype, mixer=mixer).curve()
    found = Training(stage, device, dtype, checkpointing=checkpointing, compiled=True, mixer=mixer).curve()
    assert_same_curve(found, expected, dtype)


@needs_gpu
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_teacher_in_8_bits_changes_curves_by_its_rounding(device, stage):
    expected = Training(stage, device, torch.bfloat16).curve()
    training = Training(stage, device, torch.bfloat16)
    training.teacher = fp8_copy(training.teacher, device, torch.bfloat16)
    drift = (training.curve() / expected - 1).abs()
    assert 0 < drift.max() < FP8
    assert drift.mean() < FP8 / 3


@needs_gpu
def test_8_bit_products_are_those_of_the_rounded_numbers(device):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(3584, 512, device=device), torch.randn(2, 33, 3584, device=device).bfloat16()
    found = Fp8Linear(linear, device, torch.bfloat16)(x)
    expected = Fp8Linear(linear.cpu(), torch.device("cpu"), torch.bfloat16)(x.cpu())
    assert relative_error(found.cpu().float(), expected.float()) < 1e-2  # the tensor cores' sums, and bf16 results


@needs_gpu
def test_large_matrices_are_updated_as_by_torch(device):
    torch.manual_seed(0)
    start = [torch.randn(shape, device=device).bfloat16() for shape in ((1024, 1024), (1536, 1024), (300,))]
    ours, torchs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    keys = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    optimizers = AdamW(ours, **keys), torch.optim.AdamW(torchs, **keys)
    for step in range(4):
        for pair in zip(ours, torchs, strict=True):
            gradient = torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = gradient * (float("nan") if step == 2 else 1.0)
        norms = [
            optimizer_step([optimizer], parameters, count=3, clip_val=1.0).whole
            for optimizer, parameters in zip(optimizers, (ours, torchs), strict=True)
        ]
        assert torch.equal(*norms) or step == 2
    for our, their in zip(ours, torchs, strict=True):
        state, torch_state = optimizers[0].state[our], optimizers[1].state[their]
        assert state["step"] == torch_state["step"] == 3
        for found, expected in (
            (our, their),
            *((state[name], torch_state[name]) for name in ("exp_avg", "exp_avg_sq")),
        ):
            # A unit or two of bf16's last bit after three steps, and rarely
            torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-5)
            assert (found != expected).float().mean() < 0.01


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1000, 152_064])
def test_the_loss_kernel_computes_what_torch_does(device, monkeypatch, vocab, dtype):
    torch.manual_seed(0)
    student, teacher = (4 * torch.randn(2, 37, vocab, device=device)).to(dtype)
    labels = torch.randint(vocab, (37,), device=device)
    labels[3] = -100
    found = student.clone()
    weights = {"kl_weight": 0.25, "ce_weight": 0.75, "reverse_kl_weight": 0.5}
    loss = losses.logit_loss_(found, teacher, labels, **weights)
    monkeypatch.setattr(losses, "has_triton", lambda device: False)
    torch.testing.assert_close(loss, losses.logit_loss_(student, teacher, labels, **weights), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found, student, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_never_waits_for_the_gpu(device, stage, compiled):
    training = Training(stage, device, torch.bfloat16, compiled=compiled)
    for number in range(3):
        training.step(number)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(3)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
def test_a_step_whose_loss_leaps_changes_nothing(device):
    training = Training("distill", device, torch.bfloat16)
    for number in range(3):
        training.step(number)
    before = [parameter.detach().clone() for parameter in training.student.parameters()]
    training.guard.state = torch.tensor([1e-6, 100.0, 0.0, 0.0])
    training.step(3)
    assert training.guard.state.tolist()[1:] == [100.0, 1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(training.student.parameters(), before, strict=True))


@needs_gpu
def test_a_step_that_is_not_finite_changes_nothing(device):
    training = Training("distill", device, torch.bfloat16)
    training.step(0)
    before = [parameter.detach().clone() for parameter in training.student.parameters()]
    hook = training.student.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    training.step(1)
    after = list(training.student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    hook.remove()
    training.step(2)
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@needs_gpu
def test_aligning_takes_no_more_memory_for_more_layers(device):
    def beside_weights_and_gradients(layers):
        training = Training("align", device, torch.bfloat16, layers=layers)
        training.batches = torch.randint(VOCAB, (2, 8, 2049), device=device)
        training.step(0)
        trained = sum(p.numel() * p.element_size() for p in training.student.parameters() if p.requires_grad)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        training.step(1)
        return torch.cuda.max_memory_allocated(device) - held - trained

    assert beside_weights_and_gradients(9) < 1.1 * beside_weights_and_gradients(3)


class Graphed(Training):
    """A stage as a CUDA graph, `accumulated` batches to a step."""

    def __init__(self, device, dtype, stage="align", *, accumulated=1, graphed=True, **settings):
        super().__init__(stage, device, dtype, **settings)
        self.accumulated = accumulated
        self.run = functools.partial(backward_parts, self.stage, self.student, self.teacher)
        if graphed:
            self.run = GraphedPasses(self.run, self.student, self.teacher, accumulates=accumulated > 1)

    def step(self, number):
        parts = [part for each in range(self.accumulated) for part in self.run(self.batches[(number + each) % STEPS])]
        sums, count = torch.stack([part.sum for part in parts]), sum(part.count for part in parts)
        optimizer_step(self.optimizers, self.student.parameters(), count=count, clip_val=1.0, sums=sums)
        return sums.sum() / count


@needs_gpu
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_changes_no_curve(device, stage, dtype, accumulated):
    expected = Graphed(device, dtype, stage, accumulated=accumulated, graphed=False).curve()
    assert_same_curve(Graphed(device, dtype, stage, accumulated=accumulated).curve(), expected, dtype)


@needs_gpu
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_a_graph_recomputes(device, checkpointing):
    expected = Graphed(device, torch.float32, "distill", graphed=False).curve()
    found = Graphed(device, torch.float32, "distill", checkpointing=checkpointing, compiled=True).curve()
    assert_same_curve(found, expected, torch.float32)


@needs_gpu
def test_what_waits_for_the_gpu_is_told_to_be_no_graph(device):
    training = Graphed(device, torch.float32)

    def waits(tokens, run=training.run._run):
        tokens.sum().item()
        return run(tokens)

    training.run = GraphedPasses(waits, training.student, training.teacher)
    training.step(0), training.step(1)
    with pytest.raises(ValueError, match=r"cannot be recorded as a CUDA graph .*: set train\.cuda_graphs never"):
        training.step(2)


@needs_gpu
def test_weights_without_a_gradient_have_none_beside_a_graph(device):
    training = Graphed(device, torch.float32, "extend", accumulated=2)
    spare = training.student.model.layers[0].self_attn.unused = torch.nn.Parameter(torch.ones(3, device=device))
    training.run = GraphedPasses(training.run._run, training.student, None, accumulates=True)
    for number in range(4):
        training.step(number)
    assert spare.grad is None


@needs_gpu
def test_a_graph_adds_to_what_a_batch_of_another_shape_left(device):
    """And to nothing that was there in the window before."""
    plain, graphed = (Graphed(device, torch.float32, accumulated=2, graphed=graphed) for graphed in (False, True))
    for training in (plain, graphed):
        training.losses = []
        for number in range(6):
            training.run(training.batches[number][:, :30])
            training.losses.append(training.step(number))
    torch.testing.assert_close(torch.stack(graphed.losses), torch.stack(plain.losses), rtol=1e-3, atol=0)


@needs_gpu
def test_a_graph_bears_other_shapes_between_its_replays(device):
    plain, graphed = (Graphed(device, torch.float32, graphed=graphed) for graphed in (False, True))
    for training in (plain, graphed):
        training.losses = []
        for number in range(8):
            training.losses.append(training.step(number))
            if number % 2:
                with torch.no_grad():
                    training.teacher(training.batches[0][:, :40], use_cache=False)
                parts = training.run(training.batches[number][:, :30])
                count = sum(part.count for part in parts)
                optimizer_step(training.optimizers, training.student.parameters(), count=count, clip_val=1.0)
    torch.testing.assert_close(torch.stack(graphed.losses), torch.stack(plain.losses), rtol=1e-3, atol=0)


@needs_gpu
def test_a_graphed_step_that_is_not_finite_changes_nothing(device):
    training = Graphed(device, torch.float32)
    for number in range(4):
        training.step(number)
    broken = next(p for p in training.teacher.parameters() if p.ndim == 2)
    kept, before = broken.clone(), {name: p.clone() for name, p in training.student.named_parameters()}
    broken.data.fill_(float("nan"))
    assert not torch.isfinite(training.step(4))
    assert all(torch.equal(p, before[name]) for name, p in training.student.named_parameters())
    broken.data.copy_(kept)
    assert torch.isfinite(training.step(5))
