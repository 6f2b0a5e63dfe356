"""Sequences of any lengths, one after another in [T, ...], and the slots of a table where their states lie.

A server's prompts come so: they begin from states that earlier pieces have left, and leave theirs for later ones.

Shape letters: T tokens, S sequences, G chunks, R sequences of similar length, L tokens of the longest of them, H heads,
N head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

# The chunk of both recurrences' kernels, in bf16 and fp32
CHUNK_TOKENS = 32


class Slots(NamedTuple):
    """Where sequences' states lie.

    states: fp32 [slots, H, N, N], each slot contiguous, and one any distance from the next. first, last: integers [S],
    the slots that a sequence's state is read from and written to. Negative: it begins with a state of zeros, or its
    last state is not kept. Nobody checks that no sequence writes a slot that another one reads or writes.
    """

    states: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class Sequences:
    """The lengths [S] of sequences, and what is read of them on their device.

    ranges: int32 [S, 5], longest first: number, first token, number of tokens, first chunk and number of chunks.
    chunks: int32 [G, 2], first token and number of tokens of each chunk. bounds: int32 [2, S], first and last tokens.
    """

    lengths: tuple[int, ...]
    ranges: torch.Tensor
    chunks: torch.Tensor
    bounds: torch.Tensor

    def similar(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Sequences of similar length: their numbers [R], and which tokens theirs are [R, L], -1 standing for padding
        on the right. On the CPU."""
        lengths, order = torch.tensor(self.lengths).sort(descending=True, stable=True)
        begins = torch.tensor((0, *self.lengths[:-1])).cumsum(0)[order]
        yield from ((order[run], places) for run, places in runs_of_similar_length(begins, lengths))

    def tokens_before(self, x: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token of x [1, T, C] the one before it in its sequence, and the sequences' last tokens [S, C]. last:
        [S, C], those before the first."""
        before = F.pad(x[0, :-1], (0, 0, 1, 0)).index_copy(0, self.bounds[0].long(), last.to(x.dtype))
        return before[None], x[0].index_select(0, self.bounds[1])


def sequences_of(lengths: Sequence[int], device: torch.device | str) -> Sequences:
    """Sequences of these lengths. Copies one table to the device, and does not wait for it.

    Raises ValueError if there are none, or if one is empty.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"each sequence needs one token at least, and there must be one, not lengths {list(lengths)}")
    sizes = torch.tensor(lengths)
    counts = (sizes + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    begins, first_chunks = sizes.cumsum(0) - sizes, counts.cumsum(0) - counts
    ranges = torch.stack([torch.arange(len(sizes)), begins, sizes, first_chunks, counts], dim=1)
    owner = torch.repeat_interleave(counts)
    done = (torch.arange(len(owner)) - first_chunks[owner]) * CHUNK_TOKENS
    chunks = torch.stack([begins[owner] + done, (sizes[owner] - done).clamp(max=CHUNK_TOKENS)], dim=1)
    parts = ranges[sizes.argsort(descending=True, stable=True)], chunks, torch.stack([begins, begins + sizes - 1])
    table = torch.cat([part.flatten() for part in parts]).int().to(device, non_blocking=True)
    found = zip(table.split([part.numel() for part in parts]), parts, strict=True)
    return Sequences(tuple(lengths), *(numbers.view(part.shape) for numbers, part in found))


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
