"""Corpora as datasets: training samples in the published order, and held-out windows from front to back.

Owns which tokens an item holds. Leaves batching, workers and devices to `torch.utils.data.DataLoader` and `train/`.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from radlads.data import sampling
from radlads.data.binidx import BinIdxReader, TokenSpan
from radlads.data.mixture import locate

_BLOCK_TOKENS = 2**24


class TokenSamples(Dataset[Tensor]):
    """The samples of one rank: item i is the sample with global number i * world + rank + 1.

    An item is an int64 tensor `[context_tokens + 1]`: the inputs, and the same shifted by one as labels. Numbers go on
    over epochs, so an item depends on nothing but i, `rank` and `world`, and the ranks together take every number once.
    `num_samples` counts this rank's items. `magic_prime` 0 takes the one that belongs to the corpus. Raises ValueError
    if the corpus is too short or the prime does not fit it.
    """

    def __init__(
        self,
        reader: BinIdxReader | TokenSpan,
        context_tokens: int,
        *,
        num_samples: int,
        magic_prime: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        if magic_prime:
            sampling.check_magic_prime(magic_prime, reader.num_tokens, context_tokens)
        self.magic_prime = magic_prime or sampling.magic_prime(reader.num_tokens, context_tokens)
        self.context_tokens = context_tokens
        self._reader = reader
        self._num_samples = num_samples
        self._rank = rank
        self._world = world

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> Tensor:
        i = range(self._num_samples)[i]
        number = sampling.sample_number(0, i, self._rank, self._world)
        start = sampling.sample_start(number, self.magic_prime, self.context_tokens)
        return _window(self._reader, start, self.context_tokens)


class MixedSamples(Dataset[Tensor]):
    """One rank's samples from several corpora, each in its own published order, interleaved by exact shares.

    `corpora` are readers with shares that add up to 1. Items, `num_samples`, `rank` and `world` are as in TokenSamples:
    an item depends on nothing but its number. Every corpus is ordered by its own magic prime.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[BinIdxReader, Fraction]],
        context_tokens: int,
        *,
        num_samples: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        self._corpora = [
            # A corpus's share of all ranks' samples is its length at most
            TokenSamples(reader, context_tokens, num_samples=num_samples * world)
            for reader, _ in corpora
        ]
        self._shares = [share for _, share in corpora]
        self._num_samples = num_samples
        self._rank = rank
        self._world = world

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> Tensor:
        i = range(self._num_samples)[i]
        corpus, index = locate(i * self._world + self._rank, self._shares)
        return self._corpora[corpus][index]


class HeldoutWindows(Dataset[Tensor]):
    """Consecutive windows from the start of a corpus: item i is int64 `[context_tokens + 1]`, from i * context_tokens.

    Neighbours share one token, the last label of one and the first input of the next, so every token is predicted once.
    At most `max_tokens` are predicted (None: no limit). Raises ValueError if not even one window results.
    """

    def __init__(self, reader: BinIdxReader | TokenSpan, context_tokens: int, max_tokens: int | None = None) -> None:
        if reader.num_tokens < context_tokens + 1:
            raise ValueError(
                f"{reader.path_stem}.bin holds {reader.num_tokens} tokens, less than one held-out window of "
                f"{context_tokens + 1}: use more text, or a shorter context"
            )
        if max_tokens is not None and max_tokens < context_tokens:
            raise ValueError(
                f"a limit of {max_tokens} held-out tokens is less than one window of {context_tokens}: "
                "raise the limit, or use a shorter context"
            )
        predicted_tokens = reader.num_tokens - 1 if max_tokens is None else min(reader.num_tokens - 1, max_tokens)
        self.context_tokens = context_tokens
        self._reader = reader
        self._num_windows = predicted_tokens // context_tokens

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, i: int) -> Tensor:
        i = range(self._num_windows)[i]
        return _window(self._reader, i * self.context_tokens, self.context_tokens)


def check_vocabulary(reader: BinIdxReader, vocab_size: int, path: str | Path) -> None:
    """Read every token; raise ValueError, naming `path` and the position, at the first not in `[0, vocab_size)`."""
    for start in range(0, reader.num_tokens, _BLOCK_TOKENS):
        block = reader.tokens[start : start + _BLOCK_TOKENS]
        outside = (block < 0) | (block >= vocab_size)
        if outside.any():
            offset = int(outside.argmax())
            raise ValueError(
                f"{path}: token {start + offset} is {block[offset]}, outside the model's vocabulary of {vocab_size}: "
                "use a corpus made with this model's tokenizer"
            )


def _window(reader: BinIdxReader | TokenSpan, start: int, context_tokens: int) -> Tensor:
    return torch.from_numpy(reader.tokens[start : start + context_tokens + 1].astype(np.int64))
