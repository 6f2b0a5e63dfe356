"""Stages 2 and 3: the whole student learns from the teacher's logits, from the labels, or from both."""

from collections.abc import Iterator

import torch

from radlads.config.schema import TrainConfig, stage_of
from radlads.distill.align import Align
from radlads.distill.losses import cross_entropy, kl_divergence
from radlads.distill.stage import LossPart, Stage, Trainable
from radlads.model.modeling import RadladsForCausalLM


class Logits:
    """kl_weight * KL(teacher || student) + ce_weight * cross-entropy (paper sections 3.3 and 3.4), as one part."""

    def __init__(self, name: str, *, kl_weight: float, ce_weight: float, trainable: Trainable = "all"):
        self.name, self.kl_weight, self.ce_weight, self.trainable = name, kl_weight, ce_weight, trainable
        self.needs_teacher = kl_weight > 0

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """See Stage.parts."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logits = student(inputs, use_cache=False).logits
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.kl_weight:
            assert teacher is not None
            with torch.no_grad():
                teacher_logits = teacher(inputs, use_cache=False).logits
            loss = loss + self.kl_weight * kl_divergence(teacher_logits, logits)
        if self.ce_weight:
            loss = loss + self.ce_weight * cross_entropy(logits, labels)
        yield LossPart("loss", loss, loss.detach(), labels.numel())


def build_stage(train: TrainConfig) -> Stage:
    """The stage a configuration means. Extending uses the teacher only if one is named (as the released code does)."""
    kind = stage_of(train)
    trainable: Trainable = train.trainable if train.trainable != "auto" else "mixer" if kind == "align" else "all"
    if kind == "align":
        return Align(kind=train.align_loss, trainable=trainable)
    if kind == "distill":
        return Logits(kind, kl_weight=1.0, ce_weight=0.0, trainable=trainable)
    if train.teacher.path or train.teacher.hf_path:
        weights = train.teacher
        return Logits(kind, kl_weight=weights.kl_weight, ce_weight=weights.ce_weight, trainable=trainable)
    return Logits(kind, kl_weight=0.0, ce_weight=1.0, trainable=trainable)
