"""Agreement by position: how far a model is from its teacher, and how good, after how much context.

Leaves devices and precision to the caller, as perplexity.py does. Shape letters: B batch, T tokens, M positions of one
window that are compared at a time, C hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from radlads.data.binidx import BinIdxReader
from radlads.evaluation.perplexity import check_edges, spread_windows
from radlads.model.modeling import RadladsForCausalLM

_BLOCK_TOKENS = 1024


@dataclass(frozen=True)
class Agreement:
    """Means over the predictions made at positions [first, end), from 0 at a window's start.

    loss: nats of the true next token. kl: KL(teacher || model) in nats. top1: share of positions where both find the
    same next token likeliest, in [0, 1].
    """

    first: int
    end: int
    loss: float
    kl: float
    top1: float
    num_tokens: int


@torch.no_grad()
def agreement_by_position(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    corpus: BinIdxReader,
    *,
    context_tokens: int,
    edges: Sequence[int],
    max_tokens: int | None = None,
    batch_windows: int = 1,
) -> list[Agreement]:
    """The model beside its teacher in each bin [edges[i], edges[i + 1]) of positions, both in evaluation mode.

    Reads windows of `context_tokens` that lie evenly over the whole corpus, at most `max_tokens` in sum (None: all).
    Both models are on the same device. Raises ValueError for edges that do not rise or lie outside the window, and for a
    corpus shorter than one window.
    """
    check_edges(edges, context_tokens)
    windows = spread_windows(corpus, context_tokens, max_tokens)
    totals = torch.zeros(3, context_tokens, dtype=torch.float64, device=model.device)
    modes = [each.training for each in (model, teacher)]
    for each in (model, teacher):
        each.eval()
    for batch in DataLoader(windows, batch_size=batch_windows):
        tokens = batch.to(model.device)
        hidden_BTC, taught_BTC = _hidden(model, tokens), _hidden(teacher, tokens)
        for row in range(len(tokens)):
            for start in range(0, context_tokens, _BLOCK_TOKENS):
                block = slice(start, start + _BLOCK_TOKENS)
                logits_MV, taught_MV = model.lm_head(hidden_BTC[row, block]), teacher.lm_head(taught_BTC[row, block])
                totals[:, block] += _compared(logits_MV.float(), taught_MV.float(), tokens[row, 1:][block])
    for each, mode in zip((model, teacher), modes, strict=True):
        each.train(mode)
    return [_mean(totals, first, end, len(windows)) for first, end in pairwise(edges)]


def _hidden(model: RadladsForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads at tokens [B, T + 1] but the last, [B, T, C]."""
    hidden: torch.Tensor = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    return hidden


def _compared(logits_MV: torch.Tensor, taught_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Loss, KL and agreement at each position, [3, M]."""
    log_p_MV, log_q_MV = taught_MV.log_softmax(-1), logits_MV.log_softmax(-1)
    loss_M = F.nll_loss(log_q_MV, labels_M, reduction="none")
    kl_M = (log_p_MV.exp() * (log_p_MV - log_q_MV)).sum(-1)
    return torch.stack([loss_M, kl_M, (taught_MV.argmax(-1) == logits_MV.argmax(-1)).float()]).double()


def _mean(totals: torch.Tensor, first: int, end: int, num_windows: int) -> Agreement:
    num_tokens = num_windows * (end - first)
    loss, kl, top1 = (totals[:, first:end].sum(1) / num_tokens).tolist()
    return Agreement(first, end, loss, kl, top1, num_tokens)
