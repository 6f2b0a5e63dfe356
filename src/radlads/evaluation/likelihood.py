"""How likely a model finds given continuations: what lm-eval asks of a model, by state instead of by one long pass.

Owns batching, reading long texts in pieces, and which logits are made at all. Shape letters: B batch, T tokens, V
vocabulary, M positions that are scored together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from radlads.inference.finite import NotFinite
from radlads.model.modeling import RadladsForCausalLM

Pair = tuple[Sequence[int], Sequence[int]]
Answer = tuple[float, bool]
_BLOCK_TOKENS = 1024


@dataclass(frozen=True)
class _Row:
    """One sequence to read, and the pairs it answers; their continuations differ in length and in the last token."""

    tokens: tuple[int, ...]
    pairs: list[int]
    first_scored: int


@torch.no_grad()
def log_likelihoods(
    model: RadladsForCausalLM,
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    batch_rows: int = 1,
    segment_tokens: int = 8192,
    on_answer: Callable[[int, Answer], None] = lambda number, answer: None,
) -> list[Answer]:
    """For each pair of contexts and continuations (token ids, both with one token at least) the continuation's log
    likelihood in nats and whether it is what the model would have said itself, greedily.

    A text of more than `max_tokens` + 1 tokens loses the start of its context. At most `segment_tokens` of each of
    `batch_rows` texts are read at a time, the state carried; logits are fp32 and made for continuations only.
    `on_answer` is told each answer with its pair's number as soon as it is there. Raises ValueError for a continuation
    of more than `max_tokens`, and NotFinite for logits that are not finite.
    """
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > max_tokens:
        raise ValueError(f"an answer of {longest} tokens cannot be scored in texts of {max_tokens}: raise --max-length")
    answers: list[Answer | None] = [None] * len(pairs)
    rows = _rows(pairs, max_tokens)
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        for row, scores in zip(batch, _scores(model, batch, segment_tokens), strict=True):
            for number in row.pairs:
                answer = scores.answer(pairs[number][1])
                answers[number] = answer
                on_answer(number, answer)
    return [answer for answer in answers if answer is not None]


@dataclass(frozen=True)
class _Scores:
    """Of one row: log likelihoods and greedy hits [T] of the tokens after each position but the last, whose log
    probabilities are `last` [V]."""

    log_likelihoods: torch.Tensor
    hits: torch.Tensor
    last: torch.Tensor

    def answer(self, continuation: Sequence[int]) -> Answer:
        inner = slice(len(self.hits) - len(continuation), len(self.hits) - 1)
        total = self.log_likelihoods[inner].sum() + self.last[continuation[-1]]
        greedy = self.hits[inner].all() and self.last.argmax() == continuation[-1]
        return total.item(), bool(greedy)


def _rows(pairs: Sequence[Pair], max_tokens: int) -> list[_Row]:
    """The sequences to read, longest first: pairs that differ in their last token share one."""
    by_tokens: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        text = (*context, *continuation)[-(max_tokens + 1) :]
        by_tokens.setdefault(text[:-1], []).append(number)
    rows = [
        _Row(tokens, numbers, len(tokens) - max(len(pairs[number][1]) for number in numbers))
        for tokens, numbers in by_tokens.items()
    ]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _scores(model: RadladsForCausalLM, rows: Sequence[_Row], segment_tokens: int) -> Iterator[_Scores]:
    lengths = torch.tensor([len(row.tokens) for row in rows], device=model.device)
    firsts = torch.tensor([row.first_scored for row in rows], device=model.device)
    tokens_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    tokens_BT = tokens_BT.to(model.device)
    places = torch.arange(tokens_BT.shape[1], device=model.device)
    scored_BT = (places >= firsts[:, None]) & (places < lengths[:, None])
    values_BT = torch.zeros(tokens_BT.shape, device=model.device)
    hits_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool, device=model.device)
    last_BV = torch.zeros(len(rows), model.config.vocab_size, device=model.device)
    next_BT = tokens_BT.roll(-1, dims=1)  # wrong after a row's last token, where nobody looks
    for row_M, place_M, log_p_MV in _log_probabilities(model, tokens_BT, scored_BT, segment_tokens):
        next_M = next_BT[row_M, place_M]
        values_BT[row_M, place_M] = log_p_MV.gather(1, next_M[:, None])[:, 0]
        hits_BT[row_M, place_M] = log_p_MV.argmax(1) == next_M
        ends_M = place_M == lengths[row_M] - 1
        last_BV[row_M[ends_M]] = log_p_MV[ends_M]
    # Summed by rows on the host: one wait for the device instead of two for each answer
    on_host = zip(values_BT.cpu(), hits_BT.cpu(), last_BV.cpu(), rows, strict=True)
    for values_T, hits_T, last_V, row in on_host:
        if not values_T.isfinite().all() or last_V.isnan().any():
            raise NotFinite(len(row.tokens))
        yield _Scores(values_T[: len(row.tokens)], hits_T[: len(row.tokens)], last_V)


def _log_probabilities(
    model: RadladsForCausalLM, tokens_BT: torch.Tensor, scored_BT: torch.Tensor, segment_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield rows [M], positions [M] and fp32 log probabilities [M, V] until every scored position was there."""
    cache, in_one = None, tokens_BT.shape[1] <= segment_tokens
    for start in range(0, tokens_BT.shape[1], segment_tokens):
        segment = slice(start, start + segment_tokens)
        outputs = model.model(tokens_BT[:, segment], past_key_values=cache, use_cache=not in_one)
        cache = outputs.past_key_values
        row_N, place_N = scored_BT[:, segment].nonzero(as_tuple=True)
        for row_M, place_M in zip(row_N.split(_BLOCK_TOKENS), place_N.split(_BLOCK_TOKENS), strict=True):
            logits_MV = model.lm_head(outputs.last_hidden_state[row_M, place_M])
            yield row_M, place_M + start, logits_MV.float().log_softmax(-1)
