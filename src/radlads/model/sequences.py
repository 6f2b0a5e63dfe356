"""Sequences of any lengths, one after another in [T, ...], and the slots of a table where their states lie.

A server's prompts come so: they begin from states that earlier pieces have left, and leave theirs for later ones.

Shape letters: T tokens, S sequences, G chunks, H heads, N head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

# The chunk of both recurrences' kernels, in bf16 and fp32
CHUNK_TOKENS = 32


class Slots(NamedTuple):
    """Where sequences' states lie.

    states: fp32 [slots, H, N, N], each slot contiguous, but one slot may be any distance from the next. first, last:
    int32 [S], the slots that each sequence's state is read from and written to. Negative: it begins with a state of
    zeros, or its last state is not kept. No sequence may write a slot that another one reads or writes.
    """

    states: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class Sequences:
    """The lengths [S] of sequences, each 0 or more, and what kernels read of them on their device.

    ranges: int32 [S, 5], longest first: number, first token, number of tokens, first chunk and number of chunks.
    chunks: int32 [G, 2], first token and number of tokens of each chunk.
    """

    lengths: tuple[int, ...]
    ranges: torch.Tensor
    chunks: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def similar(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For sequences of similar length, none of them empty: their numbers [R], and which of the T tokens theirs are
        [R, L], -1 standing for padding on the right. On the CPU."""
        lengths = torch.tensor(self.lengths)
        order = lengths.argsort(descending=True, stable=True)
        order = order[: int((lengths > 0).sum())]
        begins = lengths.cumsum(0) - lengths
        yield from ((order[run], places) for run, places in runs_of_similar_length(begins[order], lengths[order]))


def sequences_of(lengths: Sequence[int], device: torch.device | str) -> Sequences:
    """Sequences of these lengths. Copies one table to the device, and does not wait for it.

    Raises ValueError if a length is negative, or if there are none.
    """
    if not lengths or min(lengths) < 0:
        raise ValueError(f"give the lengths of sequences, each 0 or more, not {list(lengths)}")
    sizes = torch.tensor(lengths, dtype=torch.int32)
    counts = (sizes + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    begins, first_chunks = sizes.cumsum(0) - sizes, counts.cumsum(0) - counts
    ranges = torch.stack([torch.arange(len(sizes)), begins, sizes, first_chunks, counts], dim=1)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    done = (torch.arange(len(owner)) - first_chunks[owner]) * CHUNK_TOKENS
    chunks = torch.stack([begins[owner] + done, (sizes[owner] - done).clamp(max=CHUNK_TOKENS)], dim=1)
    ranges = ranges[sizes.argsort(descending=True, stable=True)]
    table = torch.cat([ranges.flatten(), chunks.flatten()]).int().to(device, non_blocking=True)
    on_device, rest = table.split([ranges.numel(), chunks.numel()])
    return Sequences(tuple(lengths), on_device.view(-1, 5), rest.view(-1, 2))


def runs_of_similar_length(begins: torch.Tensor, lengths: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Groups of texts, which come longest first: which of them, and which tokens theirs are [R, L], -1 at padding."""
    done = 0
    while done < len(lengths):
        # Padding of up to half a text costs less than more runs do
        run = slice(done, done + int((3 * lengths[done:] >= 2 * lengths[done]).sum()))
        columns = torch.arange(int(lengths[done]))
        places = begins[run, None] + columns
        yield run, places.masked_fill(columns >= lengths[run, None], -1)
        done = run.stop
