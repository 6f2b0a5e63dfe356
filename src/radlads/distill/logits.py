"""Stages 2 and 3: the whole student learns from the teacher's logits, from the labels, or from both."""

from collections.abc import Iterator

import torch

from radlads.config.schema import TrainConfig, stage_of
from radlads.distill.align import Align
from radlads.distill.losses import head_loss
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
        # The teacher runs first, while the student's activations do not exist yet
        teacher_hidden = teacher_head = None
        if self.kl_weight:
            assert teacher is not None
            with torch.no_grad():
                teacher_hidden = teacher.model(inputs, use_cache=False).last_hidden_state
            teacher_head = teacher.lm_head.weight
        loss = head_loss(
            student.model(inputs, use_cache=False).last_hidden_state,
            student.lm_head.weight,
            labels,
            teacher_hidden_BTC=teacher_hidden,
            teacher_head_VC=teacher_head,
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
        )
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
