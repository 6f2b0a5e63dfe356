"""Many replies at a time, in rounds: those that are not done go on together with new ones.

A round reads each prompt and what was written of its reply so far, and decodes until enough replies have ended. So a
reply can be left and taken up again at any token, which is how a run that was killed goes on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from radlads.inference.decoder import Decoder
from radlads.inference.generate import available_bytes
from radlads.inference.sampling import Sampling
from radlads.model.configuration import state_bytes
from radlads.model.modeling import RadladsForCausalLM

# A step through a growing cache takes a GPU's host as long for many rows as for one: it is not recorded as a graph
ROWS = {"cpu": 16, "cuda": 1024}
# Of the free memory, for states; a cache that grows is copied as it grows, and what reads prompts takes some too
_STATE_SHARE = 0.3
# Reading a prompt again costs less than decoding beside rows that have ended
_ENDED_SHARE = 0.5


@dataclass(eq=False)
class Reply:
    """A reply on its way. number: which of all; its text depends on it and the seed alone. tokens: so far, without the
    one that ends it. has_ended: by itself."""

    number: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False

    def is_done(self, max_tokens: int) -> bool:
        """Whether nothing is to be added."""
        return self.has_ended or len(self.tokens) >= max_tokens


def write_replies(
    model: RadladsForCausalLM,
    replies: Iterable[Reply],
    sampling: Sampling,
    stop_ids: frozenset[int],
    *,
    rows: int,
) -> Iterator[list[tuple[Reply, int | None]]]:
    """Write replies, first come, first served, at most `rows` at a time; yield what each step adds to them.

    A step's additions are of the rows that are being written: a token, or None where a reply ends. A reply that has
    sampling.max_tokens is left as it is. Raises NotFinite as the decoder does.
    """
    assert sampling.seed is not None
    waiting, current = iter(replies), list[Reply]()
    while True:
        while len(current) < rows and (new := next(waiting, None)) is not None:
            if not new.is_done(sampling.max_tokens):
                current.append(new)
        if not current:
            return
        yield from _round(model, current, sampling, stop_ids)
        current = [reply for reply in current if not reply.is_done(sampling.max_tokens)]


def _round(
    model: RadladsForCausalLM, replies: list[Reply], sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[list[tuple[Reply, int | None]]]:
    """Go on with the replies until a share of them is done."""
    decoder = Decoder(model, len(replies), sampling, stop_ids)
    decoder.prefill([[*reply.prompt, *reply.tokens] for reply in replies], generators=generators(replies, sampling))
    is_done = [False] * len(replies)
    for step in decoder.generated(sampling.max_tokens):
        added: list[tuple[Reply, int | None]] = []
        for row, (reply, token) in enumerate(zip(replies, step, strict=True)):
            if is_done[row]:
                continue
            if token is None:
                reply.has_ended = True
            else:
                reply.tokens.append(token)
            added.append((reply, token))
            is_done[row] = reply.is_done(sampling.max_tokens)
        if added:
            yield added
        if sum(is_done) >= _ENDED_SHARE * len(replies):
            return
    for reply in replies:  # the decoder stops where all rows have ended
        if not reply.is_done(sampling.max_tokens):
            reply.has_ended = True
            yield [(reply, None)]


def generators(replies: Sequence[Reply], sampling: Sampling) -> list[torch.Generator]:
    """Random numbers for each reply, those that its tokens have used behind it."""
    assert sampling.seed is not None
    found = []
    for reply in replies:
        generator = torch.Generator().manual_seed(sampling.seed + reply.number)
        torch.rand(len(reply.tokens), generator=generator)
        found.append(generator)
    return found


def fitting_rows(model: RadladsForCausalLM, num_tokens: int, wanted: int | None = None) -> int:
    """How many texts of num_tokens are written at a time: as asked for, or as many as are quick and fit.

    Raises ValueError if not even one fits, or as many as are asked for do not.
    """
    num_bytes = state_bytes(model.config, num_tokens, bytes_per_value=model.dtype.itemsize)
    free = int(available_bytes(model.device) * _STATE_SHARE)
    least = wanted or 1
    if least * num_bytes > free:
        raise ValueError(
            f"{least} texts of {num_tokens:,} tokens need {least * num_bytes / 1e9:.3g} GB of state, but there are "
            f"{free / 1e9:.3g} GB for it: set a smaller --batch-size or --max-tokens"
        )
    return wanted or min(ROWS[model.device.type], free // num_bytes)


def reply_sampling(sampling: Sampling, vocab: int) -> Sampling:
    """The sampling, that never draws an id which the tokenizer has no token for."""
    return replace(sampling, num_ids=sampling.num_ids or vocab)
