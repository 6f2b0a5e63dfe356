"""How good a student is: loss, KL to the teacher and top-1 agreement on held-out text."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from radlads.distill.losses import cross_entropy, kl_divergence
from radlads.model.modeling import RadladsForCausalLM


@dataclass(frozen=True)
class Heldout:
    """Means per token. loss: nats of the true next token. kl: KL(teacher || student) in nats. top1: share of tokens
    for which both think the same next token likeliest, in [0, 1]. kl and top1 are None without a teacher."""

    loss: float
    kl: float | None
    top1: float | None
    num_tokens: int


@torch.no_grad()
def measure(
    student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, batches: Iterable[torch.Tensor]
) -> Heldout:
    """Measure on batches [B, T + 1] of held-out tokens, in evaluation mode and the student's own precision."""
    was_training = student.training
    student.eval()
    loss = kl = 0.0
    agreed = num_tokens = 0
    for batch in batches:
        tokens = batch.to(student.device)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logits = student(inputs, use_cache=False).logits
        loss += cross_entropy(logits, labels).double().item()
        num_tokens += labels.numel()
        if teacher is not None:
            teacher_logits = logits if teacher is student else teacher(inputs, use_cache=False).logits
            kl += kl_divergence(teacher_logits, logits).double().item()
            agreed += int((teacher_logits.argmax(-1) == logits.argmax(-1)).sum())
    student.train(was_training)
    if teacher is None:
        return Heldout(loss / num_tokens, None, None, num_tokens)
    return Heldout(loss / num_tokens, kl / num_tokens, agreed / num_tokens, num_tokens)
