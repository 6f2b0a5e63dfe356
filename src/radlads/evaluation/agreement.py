"""Agreement by position: how far a model is from its teacher, and how good, after how much context.

Leaves devices and precision to the caller, as perplexity.py does. Shape letters: B batch, T tokens, M positions of one
window that are compared at a time, C hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

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
    Both models are on the same device. Raises ValueError for edges that do not rise or lie outside the window, and for
    a corpus shorter than one window.
    """
    check_edges(edges, context_tokens)
    windows = spread_windows(corpus, context_tokens, max_tokens)
    totals = torch.zeros(3, context_tokens, dtype=torch.float64, device=model.device)
    for _, values_3BT in compared_windows(model, teacher, windows, batch_windows=batch_windows):
        totals += values_3BT.sum(1)
    return [_mean(totals, first, end, len(windows)) for first, end in pairwise(edges)]


@torch.no_grad()
def compared_windows(
    model: RadladsForCausalLM, teacher: RadladsForCausalLM, windows: Dataset[torch.Tensor], *, batch_windows: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens [B, T + 1] on the models' device, and loss, KL and agreement (0 or 1) of each prediction, as
    Agreement has them: [3, B, T], fp64. Both models run in evaluation mode. windows: [T + 1] each.
    """
    modes = [each.training for each in (model, teacher)]
    for each in (model, teacher):
        each.eval()
    for batch in DataLoader(windows, batch_size=batch_windows):
        tokens = batch.to(model.device)
        hidden_BTC, taught_BTC = _hidden(model, tokens), _hidden(teacher, tokens)
        yield (
            tokens,
            torch.stack(
                [_row(model, teacher, *row) for row in zip(hidden_BTC, taught_BTC, tokens, strict=True)], dim=1
            ),
        )
    for each, mode in zip((model, teacher), modes, strict=True):
        each.train(mode)


def _row(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    hidden_TC: torch.Tensor,
    taught_TC: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Loss, KL and agreement of one window, [3, T]; logits exist for _BLOCK_TOKENS at a time."""
    blocks = zip(*(x.split(_BLOCK_TOKENS) for x in (hidden_TC, taught_TC, tokens[1:])), strict=True)
    compared = [
        _compared(model.lm_head(hidden_MC).float(), teacher.lm_head(taught_MC).float(), labels_M)
        for hidden_MC, taught_MC, labels_M in blocks
    ]
    return torch.cat(compared, dim=1)


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
