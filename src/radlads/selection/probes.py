"""What layers are chosen by: distance to the teacher on text, or facts that are found again in long prompts.

Owns the batches, their scores, and which of two values is better. Shape letters: B rows, T tokens, M tokens at a time,
C hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from radlads.evaluation.retrieval import Prompt
from radlads.model.modeling import RadladsForCausalLM
from radlads.selection.command import RECALL_DISTANCE, Criterion

Values = Mapping[str, float]
"""What was measured of one student, by name."""

# Tokens in a batch, unless one row has more: the teacher's log-probabilities of all of them are kept in fp32 while the
# candidates are measured, 1.2 GB at a vocabulary of 152 064
_BATCH_TOKENS = 2048
# Tokens whose fp32 logits of the student exist at a time
_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Asked:
    """A batch: `tokens` [B, T] to run, and the sums, fp64, that follow from what the head reads, [B, T, C]."""

    tokens: torch.Tensor
    sums: Callable[[torch.Tensor], torch.Tensor]


class Probe(Protocol):
    """A measurement that many students can be put to, batch by batch."""

    by: Criterion

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def asked(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM) -> Iterator[Asked]:
        """Every batch, for students that have this one's head. The teacher runs once for each."""
        ...

    def values(self, sums: torch.Tensor) -> Values:
        """The means, of the sums of all batches."""
        ...


class TextProbe:
    """KL(teacher || student) in nats, the mean over all predictions, and over those of recalled pairs.

    windows: [T + 1] each. Raises ValueError if recalled pairs decide and there are none.
    """

    def __init__(self, windows: Iterable[torch.Tensor], by: Literal["kl", "recalled"]):
        self.by: Criterion = by
        rows = torch.stack(list(windows))
        self.context_tokens = rows.shape[1] - 1
        self._batches = rows.split(max(1, _BATCH_TOKENS // self.context_tokens))
        self.num_tokens = len(rows) * self.context_tokens
        self.num_recalled = sum(int(recalled(batch).sum()) for batch in self._batches)
        if by == "recalled" and not self.num_recalled:
            raise ValueError(
                f"no pair of tokens of this text stands twice in a window of {self.context_tokens}, {RECALL_DISTANCE} "
                "tokens apart: give longer windows or more text, or choose by kl"
            )

    def __len__(self) -> int:
        return len(self._batches)

    def asked(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM) -> Iterator[Asked]:
        """See Probe."""
        for batch in self._batches:
            rows = batch.to(student.device)
            hidden_MC = teacher.model(rows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
            log_p_MV = torch.cat([_log_softmax(teacher, block) for block in hidden_MC.split(_BLOCK_TOKENS)])
            yield Asked(
                rows[:, :-1],
                partial(_kl_sums, student=student, log_p_MV=log_p_MV, marked_M=recalled(rows).flatten()),
            )

    def values(self, sums: torch.Tensor) -> Values:
        """See Probe. `recalled` only if there are such pairs."""
        kl, marked = sums.tolist()
        values = {"kl": kl / self.num_tokens}
        return values | {"recalled": marked / self.num_recalled} if self.num_recalled else values


class NeedleProbe:
    """The share of prompts whose answer the model gives, each token of it being the likeliest after those before.

    Nothing is generated: the answer is read along, so that a prompt is one pass. That finds right what greedy decoding
    finds right. Among equal shares the smaller loss of the answers, in nats per token, is better.
    prompts: all of one length. num_ids: only smaller ids are tokens of the vocabulary.
    """

    by: Criterion = "needle"

    def __init__(self, prompts: Sequence[Prompt], num_ids: int):
        self._prompts, self._num_ids = prompts, num_ids
        self.num_tokens = sum(len(prompt.answer) for prompt in prompts)
        self._rows = max(1, _BATCH_TOKENS // len(prompts[0].tokens))

    def __len__(self) -> int:
        return -(-len(self._prompts) // self._rows)

    def asked(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM) -> Iterator[Asked]:
        """See Probe. The teacher does not run."""
        for start in range(0, len(self._prompts), self._rows):
            prompts = self._prompts[start : start + self._rows]
            longest = max(len(prompt.answer) for prompt in prompts)
            # A shorter answer ends with zeros, which nothing that counts sees
            rows = [[*each.tokens, *each.answer, *[0] * (longest - len(each.answer))] for each in prompts]
            tokens = torch.tensor(rows, device=student.device)[:, :-1]

            yield Asked(tokens, partial(self._sums, prompts=prompts, student=student))

    def _sums(
        self, hidden_BTC: torch.Tensor, *, prompts: Sequence[Prompt], student: RadladsForCausalLM
    ) -> torch.Tensor:
        """Answers that are right, and the answers' loss."""
        right, loss = 0, 0.0
        for hidden_TC, prompt in zip(hidden_BTC, prompts, strict=True):
            first = len(prompt.tokens) - 1
            logits = student.lm_head(hidden_TC[first : first + len(prompt.answer)])[:, : self._num_ids].float()
            answer = torch.tensor(prompt.answer, device=logits.device)
            right += int(bool((logits.argmax(-1) == answer).all()))
            loss += float(F.cross_entropy(logits, answer, reduction="sum"))
        return torch.tensor([right, loss], dtype=torch.float64, device=hidden_BTC.device)

    def values(self, sums: torch.Tensor) -> Values:
        """See Probe."""
        right, loss = sums.tolist()
        return {"needle": right / len(self._prompts), "answer_loss": loss / self.num_tokens}


def rank(values: Values, by: Criterion) -> tuple[float, ...]:
    """A key by which better values sort first."""
    return (-values["needle"], values["answer_loss"]) if by == "needle" else (values[by],)


def recalled(rows: torch.Tensor, distance: int = RECALL_DISTANCE) -> torch.Tensor:
    """Of rows [B, T + 1], where the pair (input, label) stood in its row at least `distance` tokens earlier: boolean
    [B, T]."""
    inputs, labels = rows[:, :-1], rows[:, 1:]
    B, T = inputs.shape
    size = rows.max() + 1
    row = torch.arange(B, device=rows.device)[:, None]
    place = torch.arange(T, device=rows.device).expand(B, T)
    _, kind = torch.unique((row * size + inputs) * size + labels, return_inverse=True)
    first = torch.full((B * T,), T, device=rows.device).scatter_reduce(0, kind.flatten(), place.flatten(), "amin")
    return place - first[kind] >= distance


def _kl_sums(
    hidden_BTC: torch.Tensor, *, student: RadladsForCausalLM, log_p_MV: torch.Tensor, marked_M: torch.Tensor
) -> torch.Tensor:
    """KL over all tokens and over the marked ones."""
    blocks = zip(hidden_BTC.flatten(0, 1).split(_BLOCK_TOKENS), log_p_MV.split(_BLOCK_TOKENS), strict=True)
    kl_M = torch.cat([_kl(_log_softmax(student, block_MC), block_MV) for block_MC, block_MV in blocks]).double()
    return torch.stack([kl_M.sum(), kl_M[marked_M].sum()])


def _log_softmax(model: RadladsForCausalLM, hidden_MC: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [M, V], fp32."""
    logits: torch.Tensor = model.lm_head(hidden_MC)
    return logits.float().log_softmax(-1)


def _kl(log_q_MV: torch.Tensor, log_p_MV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each token."""
    return F.kl_div(log_q_MV, log_p_MV, reduction="none", log_target=True).sum(-1)
