"""Rows of whole conversations: which of them a training row holds, and what the assistant wrote in it.

A row is one int64 tensor, like a row of any corpus: a token's id in the low 32 bits, and flags above it, so that it
travels as one (`flags` tells them apart). Its order is a pure function of the sample's number and the seed. Leaves to
`distill/` what is learnt from it.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from radlads.data.binidx import BinIdxReader
from radlads.data.mask import read_mask
from radlads.data.mixture import locate

_ID_BITS = 32
OWN = 1 << _ID_BITS
"""The assistant wrote this token."""
BEGINS = 1 << (_ID_BITS + 1)
"""A conversation begins with this token, or the padding at the end of a row."""
BY_STUDENT = 1 << (_ID_BITS + 2)
"""The token is of a conversation whose last reply the student wrote."""
TO_WRITE = 1 << (_ID_BITS + 3)
"""The student is to write this row. It has no tokens yet."""
# Rows that are open at a time while conversations are packed: more would be a little fuller, and slower to find
_OPEN_ROWS = 256


class Flags(NamedTuple):
    """Rows [B, T] taken apart: ids [B, T], and booleans [B, T] as the flags of the same names say."""

    ids: Tensor
    own: Tensor
    begins: Tensor
    by_student: Tensor


def flags(rows: Tensor) -> Flags:
    """The tokens of rows [B, T], and what is known of them."""
    of = ((rows & flag) != 0 for flag in (OWN, BEGINS, BY_STUDENT))
    return Flags(rows & (OWN - 1), *of)


def as_row(pieces: Sequence[tuple[NDArray, NDArray]], num_tokens: int, *, flag: int = 0) -> Tensor:
    """A row [num_tokens] of conversations, ids and masks, with padding at its end. flag: of all their tokens."""
    row = np.zeros(num_tokens, dtype=np.int64)
    place = 0
    for ids, mask in pieces:
        row[place : place + len(ids)] = ids.astype(np.int64) | (mask.astype(np.int64) * OWN) | flag
        row[place] |= BEGINS
        place += len(ids)
    assert place <= num_tokens
    if place < num_tokens:
        row[place] |= BEGINS
    return torch.from_numpy(row)


class Conversations:
    """A corpus's conversations that fit into rows of `context_tokens` + 1 and have something to learn.

    Longer ones are cut at the end of a row; num_cut counts them. num_empty: those without a token of the assistant's
    there, which are left out. Raises ValueError if none is left, and as read_mask does.
    """

    def __init__(self, reader: BinIdxReader, context_tokens: int):
        self.reader, self._mask = reader, read_mask(reader)
        starts = reader.document_starts()
        ends = np.minimum(starts[1:], starts[:-1] + context_tokens + 1)
        self.num_cut = int((ends < starts[1:]).sum())
        before = np.concatenate([[0], np.cumsum(self._mask)])
        # The first token of a conversation is predicted from nothing
        firsts = np.minimum(starts[:-1] + 1, ends)
        learnt = before[ends] - before[firsts] > 0
        self.num_empty = int((~learnt).sum())
        self.starts, self.ends = starts[:-1][learnt], ends[learnt]
        if not len(self.starts):
            raise ValueError(
                f"{reader.path_stem}.bin has no conversation with a reply in its first {context_tokens:,} tokens: "
                "raise model.ctx_len, or build the corpus from other conversations"
            )

    def reply_ends(self) -> dict[int, int]:
        """The tokens that end replies of the corpus, each with how many."""
        is_last = np.zeros(self.reader.num_tokens, dtype=bool)
        is_last[self.reader.document_starts()[1:] - 1] = True
        is_end = self._mask & (is_last | ~np.append(self._mask[1:], False))
        tokens, counts = np.unique(self.reader.tokens[is_end], return_counts=True)
        return dict(zip(tokens.tolist(), counts.tolist(), strict=True))

    def mean_tokens(self) -> float:
        """Of a conversation, as far as it is read."""
        return float((self.ends - self.starts).mean())

    def notes(self, context_tokens: int) -> list[str]:
        """What is not read, a sentence if anything."""
        counts = (
            (self.num_cut, f"cut at {context_tokens:,} tokens"),
            (self.num_empty, "left out, without a reply there"),
        )
        found = [f"{count:,} are {what}" for count, what in counts if count]
        return [f"of the conversations in {self.reader.path_stem}.bin, {', '.join(found)}"] if found else []

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> tuple[NDArray, NDArray]:
        span = slice(int(self.starts[i]), int(self.ends[i]))
        return self.reader.tokens[span], self._mask[span]

    def beginning(self, i: int, choice: float) -> NDArray:
        """A conversation up to where one of its replies begins: which one, `choice` in [0, 1) says."""
        ids, mask = self[i]
        replies = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
        replies = replies[replies > 0] if (replies > 0).any() else np.array([1])
        return ids[: replies[int(choice * len(replies))]]


class ConversationRows(Dataset[Tensor]):
    """One rank's rows of whole conversations, packed to leave little padding: item i is sample number i * world + rank.

    An item is int64 [context_tokens + 1], see `flags`. Conversations are packed once, by the seed, and an epoch takes
    every row once, in an order of its own. Several corpora take turns by exact shares, as in MixedSamples.
    on_policy_share: of the samples, spread evenly, those that the student writes; they are TO_WRITE.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Conversations, Fraction]],
        context_tokens: int,
        *,
        num_samples: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        on_policy_share: Fraction = Fraction(0),
    ) -> None:
        assert 0 <= rank < world
        self.corpora, self.shares = [corpus for corpus, _ in corpora], [share for _, share in corpora]
        self._rows = [packed(corpus.ends - corpus.starts, context_tokens + 1, seed) for corpus in self.corpora]
        self.context_tokens, self._seed, self._num_samples = context_tokens, seed, num_samples
        self._rank, self._world, self.on_policy_share = rank, world, on_policy_share
        self._orders: dict[int, tuple[int, NDArray]] = {}  # of each corpus its newest epoch

    @property
    def notes(self) -> list[str]:
        """What of the corpora is not read, a sentence each."""
        return [note for corpus in self.corpora for note in corpus.notes(self.context_tokens)]

    @property
    def rows_in_epoch(self) -> int:
        """Rows of all corpora."""
        return sum(map(len, self._rows))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> Tensor:
        number = range(self._num_samples)[i] * self._world + self._rank
        written = num_on_policy(number, self.on_policy_share)
        if num_on_policy(number + 1, self.on_policy_share) > written:
            return torch.full((self.context_tokens + 1,), TO_WRITE | written, dtype=torch.int64)
        corpus, index = locate(number - written, self.shares)
        epoch, place = divmod(index, len(self._rows[corpus]))
        row = self._rows[corpus][int(self._order(corpus, epoch)[place])]
        return as_row([self.corpora[corpus][each] for each in row], self.context_tokens + 1)

    def _order(self, corpus: int, epoch: int) -> NDArray:
        if corpus not in self._orders or self._orders[corpus][0] != epoch:
            draw = np.random.default_rng([self._seed, corpus, epoch])
            self._orders[corpus] = epoch, draw.permutation(len(self._rows[corpus]))
        return self._orders[corpus][1]


def num_on_policy(number: int, share: Fraction) -> int:
    """How many of the samples before sample `number` (from 0) the student writes."""
    return int(number * share)


def packed(lengths: NDArray, num_tokens: int, seed: int) -> list[list[int]]:
    """Which of conversations of these lengths lie in each row of num_tokens: each goes to the fullest of a few hundred
    open rows that it fits into, in an order drawn by the seed."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # free tokens and number, sorted
    for each in np.random.default_rng([seed, 0]).permutation(len(lengths)).tolist():
        length = int(lengths[each])
        found = bisect_left(open_rows, (length, -1))
        if found < len(open_rows):
            free, row = open_rows.pop(found)
        else:
            free, row = num_tokens, len(rows)
            rows.append([])
        rows[row].append(each)
        insort(open_rows, (free - length, row))
        if len(open_rows) > _OPEN_ROWS:
            open_rows.pop(0)
    return rows
