"""The loss curve of a tiny student over 50 steps is the same, however its losses and gradients are computed."""

import pytest
import tiny
import torch
from tolerances import TRAJECTORY_MAX, TRAJECTORY_MEAN

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.data.loader import TokenSamples
from radlads.distill import losses
from radlads.distill.logits import Logits, build_stage
from radlads.distill.losses import cross_entropy, kl_divergence
from radlads.distill.stage import LossPart, is_trainable
from radlads.model import recurrence
from radlads.train.optimizers.optim import build_optimizers
from radlads.train.optimizers.step import backward_parts, optimizer_step

STEPS, BATCH = 50, 4
BOTH = {"train.teacher.kl_weight": 0.5, "train.teacher.ce_weight": 0.5}


class PlainLogits(Logits):
    """The same stage through all tokens' logits and autograd."""

    def parts(self, student, teacher, tokens):
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logits = student(inputs, use_cache=False).logits
        loss = self.ce_weight * cross_entropy(logits, labels)
        if self.kl_weight:
            with torch.no_grad():
                teacher_logits = teacher(inputs, use_cache=False).logits
            loss = loss + self.kl_weight * kl_divergence(teacher_logits, logits)
        yield LossPart("loss", loss, loss.detach(), labels.numel())


def curve(teacher_folder, corpus, stage_name, *, plain=False, checkpointing="none", backend=None):
    """The loss of each step, and the weights after the last."""
    teacher_keys = BOTH | {"train.teacher.hf_path": str(teacher_folder)} if stage_name == "extend" else {}
    config = tiny.stage_config(corpus, stage_name, **teacher_keys)
    source = open_teacher(teacher_folder)
    torch.manual_seed(0)
    student, teacher = build_student(source, config.model)[0].train(), build_teacher(source)
    stage = build_stage(config.train)
    if plain:
        stage = PlainLogits(stage.name, kl_weight=stage.kl_weight, ce_weight=stage.ce_weight)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, student, stage.trainable))
    student.set_activation_checkpointing(checkpointing)
    if backend is not None:
        student.compile_blocks(backend=backend)
        teacher.compile_blocks(backend=backend)
    optimizers = build_optimizers(student, config.train)
    samples = TokenSamples(BinIdxReader(config.train.data_file), 16, num_samples=STEPS * BATCH, magic_prime=0)
    losses_seen = []
    for step in range(STEPS):
        tokens = torch.stack([samples[step * BATCH + row] for row in range(BATCH)])
        parts = backward_parts(stage, student, teacher, tokens)
        count = sum(part.count for part in parts)
        losses_seen.append(sum(part.sum for part in parts) / count)
        optimizer_step(optimizers, student.parameters(), count=count, clip_val=1.0)
    return torch.stack(losses_seen), [p.detach() for p in student.parameters()]


@pytest.fixture(scope="module")
def straight(teacher, corpus_folder):
    """Each stage's curve without checkpointing and compiling, computed once."""
    known = {}

    def curve_of(stage):
        if stage not in known:
            known[stage] = curve(teacher, corpus_folder, stage)
        return known[stage]

    return curve_of


def assert_same(found, expected):
    drift = (found[0] / expected[0] - 1).abs()
    assert len(drift) == STEPS
    assert expected[0][-5:].mean() < 0.95 * expected[0][:5].mean(), "a curve that learns nothing shows nothing"
    assert drift.max() < TRAJECTORY_MAX
    assert drift.mean() < TRAJECTORY_MEAN


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("stage", ["distill", "extend"])
def test_checkpointing_changes_no_curve(teacher, corpus_folder, straight, stage, checkpointing):
    assert_same(curve(teacher, corpus_folder, stage, checkpointing=checkpointing), straight(stage))


@pytest.mark.parametrize("block_tokens", [2048, 24])
@pytest.mark.parametrize("stage", ["distill", "extend"])
def test_fused_losses_change_no_curve(teacher, corpus_folder, straight, monkeypatch, stage, block_tokens):
    monkeypatch.setattr(losses, "BLOCK_TOKENS", block_tokens)
    expected = straight(stage) if block_tokens == 2048 else curve(teacher, corpus_folder, stage)
    assert_same(curve(teacher, corpus_folder, stage, plain=True), expected)


@pytest.fixture
def opaque_recurrence(monkeypatch):
    """The chunked recurrence out of the compiler's sight, as the GPU's kernels are."""
    monkeypatch.setattr(recurrence, "rwkv7_chunked", torch.compiler.disable(recurrence.rwkv7_chunked))


@pytest.mark.usefixtures("opaque_recurrence")
@pytest.mark.parametrize(
    ("stage", "checkpointing"), [("align", "none"), ("distill", "selective"), ("extend", "full"), ("extend", "none")]
)
def test_compiling_changes_no_curve(teacher, corpus_folder, straight, stage, checkpointing):
    keys = {"checkpointing": checkpointing, "backend": "aot_eager"}
    assert_same(curve(teacher, corpus_folder, stage, **keys), straight(stage))


@pytest.mark.slow
@pytest.mark.usefixtures("opaque_recurrence")
def test_generated_kernels_change_no_curve(teacher, corpus_folder, straight):
    assert_same(curve(teacher, corpus_folder, "distill", backend="inductor"), straight("distill"))


def test_a_curve_that_differs_is_seen(straight):
    losses_seen, weights = straight("align")
    with pytest.raises(AssertionError):
        assert_same((losses_seen * (1 + 2 * TRAJECTORY_MAX), weights), (losses_seen, weights))
