"""Loss by position: how well a model predicts held-out text after how much context.

Owns which windows are read and what is summed where. Leaves devices and precision to the caller: the model runs where
it stands, and under the caller's autocast if there is one. Shape letters: B batch, T tokens, S tokens of a segment,
C hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from radlads.data.binidx import BinIdxReader
from radlads.data.loader import HeldoutWindows
from radlads.inference.finite import NotFinite
from radlads.model.modeling import RadladsForCausalLM

_BLOCK_TOKENS = 1024


@dataclass(frozen=True)
class PositionBin:
    """Mean over the predictions made at positions [first, end), from 0 at a window's start. loss: nats per token."""

    first: int
    end: int
    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def loss_by_position(
    model: RadladsForCausalLM,
    corpus: BinIdxReader,
    *,
    context_tokens: int,
    edges: Sequence[int],
    max_tokens: int | None = None,
    batch_windows: int = 1,
    segment_tokens: int = 8192,
) -> list[PositionBin]:
    """The model's next-token loss in each bin [edges[i], edges[i + 1]) of positions, in evaluation mode.

    Reads windows of `context_tokens` that lie evenly over the whole corpus, at most `max_tokens` in sum (None: all).
    A window longer than `segment_tokens` goes through the model in segments, the state carried from one to the next;
    logits exist for 1024 tokens at a time. So memory does not grow with the context but for a softmax model's cache.
    Raises ValueError for edges that do not rise or lie outside the window, and for a corpus shorter than one window,
    and NotFinite, naming the segment's end, for losses that are not finite.
    """
    check_edges(edges, context_tokens)
    windows = spread_windows(corpus, context_tokens, max_tokens)
    totals = torch.zeros(context_tokens, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for tokens in DataLoader(windows, batch_size=batch_windows):
        for start, losses_BS in _segment_losses(model, tokens.to(model.device), segment_tokens):
            end = start + losses_BS.shape[1]
            totals[start:end] += losses_BS.sum(0).cpu().double()
            if not totals[start:end].isfinite().all():
                raise NotFinite(end)
    model.train(was_training)
    return [
        PositionBin(
            first, end, totals[first:end].sum().item() / (len(windows) * (end - first)), len(windows) * (end - first)
        )
        for first, end in pairwise(edges)
    ]


def check_edges(edges: Sequence[int], context_tokens: int) -> None:
    """Refuse, with ValueError, edges of bins that do not rise, or that leave the window."""
    rising = len(edges) >= 2 and all(first < end for first, end in pairwise(edges))
    if not rising or edges[0] < 0 or edges[-1] > context_tokens:
        raise ValueError(
            f"the edges {list(edges)} must rise from 0 or more to at most the context of {context_tokens} tokens"
        )


def spread_windows(corpus: BinIdxReader, context_tokens: int, max_tokens: int | None = None) -> Subset[torch.Tensor]:
    """Windows [context_tokens + 1] that lie evenly over the corpus, as many as `max_tokens` allows, at least one."""
    windows = HeldoutWindows(corpus, context_tokens)
    wanted = len(windows) if max_tokens is None else min(len(windows), max(1, max_tokens // context_tokens))
    return Subset(windows, [i * len(windows) // wanted for i in range(wanted)])


def _segment_losses(
    model: RadladsForCausalLM, tokens: torch.Tensor, segment_tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first position, losses [B, S]) for each segment of tokens [B, T + 1]."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    cache, in_one = None, inputs.shape[1] <= segment_tokens
    for start in range(0, inputs.shape[1], segment_tokens):
        segment = slice(start, start + segment_tokens)
        outputs = model.model(inputs[:, segment], past_key_values=cache, use_cache=not in_one)
        cache = outputs.past_key_values
        hidden_NC, labels_N = outputs.last_hidden_state.flatten(0, 1), labels[:, segment].flatten()
        losses = [
            F.cross_entropy(model.lm_head(hidden_MC).float(), labels_M, reduction="none")
            for hidden_MC, labels_M in zip(hidden_NC.split(_BLOCK_TOKENS), labels_N.split(_BLOCK_TOKENS), strict=True)
        ]
        yield start, torch.cat(losses).view(len(inputs), -1)
