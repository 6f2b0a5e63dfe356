"""Stages 2 and 3: the whole student learns from the teacher's logits, from the labels, or from both."""

import functools
from collections.abc import Iterator, Sequence

import torch

from radlads.config.schema import TrainConfig, stage_of
from radlads.distill.align import Align
from radlads.distill.documents import Cut, Sequences, cut_of, whole_rows
from radlads.distill.instruct import Instruct
from radlads.distill.losses import head_loss
from radlads.distill.stage import LossPart, Stage, Trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import call_whole, whole


class Logits:
    """kl_weight * KL(teacher || student) + ce_weight * cross-entropy (paper sections 3.3 and 3.4).

    `cut` makes sequences of rows, each batch of them a part; a position whose label does not count has neither loss.
    """

    def __init__(
        self, name: str, *, kl_weight: float, ce_weight: float, trainable: Trainable = "all", cut: Cut = whole_rows
    ):
        self.name, self.kl_weight, self.ce_weight, self.trainable = name, kl_weight, ce_weight, trainable
        self.needs_teacher, self._cut = kl_weight > 0, cut

    def part_names(self, student: RadladsForCausalLM) -> list[str]:
        """See Stage.part_names."""
        return ["loss"]

    def share(self, student: RadladsForCausalLM) -> float:
        """See Stage.share."""
        return 1.0

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """See Stage.parts."""
        for sequences in self._cut(tokens):
            yield self._part(student, teacher, sequences)

    def _part(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, sequences: Sequences) -> LossPart:
        counted = sequences.counted
        # The teacher runs first, while the student's activations do not exist yet
        teacher_hidden = None
        if self.kl_weight:
            assert teacher is not None
            with torch.no_grad():
                teacher_hidden = _hidden(teacher, sequences)
        hidden = _hidden(student, sequences)
        labels = sequences.labels if counted is None else sequences.labels[counted]
        read_head = functools.partial(call_whole, student.lm_head, self._head_loss, hidden, labels)
        if teacher_hidden is None or teacher is None:
            loss = read_head(None, None)
        else:
            with whole(teacher.lm_head):
                loss = read_head(teacher_hidden, teacher.lm_head.weight)
        return LossPart("loss", loss, loss.detach(), sequences.count)

    def _head_loss(self, head: torch.nn.Module, hidden, labels, teacher_hidden, teacher_head) -> torch.Tensor:
        return head_loss(
            hidden,
            head.weight,  # type: ignore[arg-type]
            labels,
            teacher_hidden_BTC=teacher_hidden,
            teacher_head_VC=teacher_head,
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
        )


def _hidden(model: RadladsForCausalLM, sequences: Sequences) -> torch.Tensor:
    """What the head reads: [B, T, C], or [N, C] of the N positions that count."""
    hidden = model.model(sequences.inputs, use_cache=False, seq_idx=sequences.numbers).last_hidden_state
    return hidden if sequences.counted is None else hidden[sequences.counted]


def build_stage(train: TrainConfig, *, end_ids: Sequence[int] = ()) -> Stage:
    """The stage a configuration means. Extending uses the teacher only if one is named (as the released code does).

    end_ids: the tokens that end a document, where the configuration asks for documents (see document_ends).
    """
    kind = stage_of(train)
    trainable: Trainable = train.trainable if train.trainable != "auto" else "mixer" if kind == "align" else "all"
    if kind == "align":
        return Align(kind=train.align_loss, trainable=trainable, cut=cut_of(train, end_ids, masks=False))
    if kind == "instruct":
        return Instruct(on_policy=train.on_policy_share > 0, divergence=train.on_policy_kl, trainable=trainable)
    cut = cut_of(train, end_ids)
    if kind == "distill":
        return Logits(kind, kl_weight=1.0, ce_weight=0.0, trainable=trainable, cut=cut)
    if train.teacher.path or train.teacher.hf_path:
        weights = train.teacher
        mixed = {"kl_weight": weights.kl_weight, "ce_weight": weights.ce_weight}
        return Logits(kind, **mixed, trainable=trainable, cut=cut)
    return Logits(kind, kl_weight=0.0, ce_weight=1.0, trainable=trainable, cut=cut)
