"""Rows that hold several texts, one after another: where each begins, and running something on each by itself.

Trainers pack rows to waste nothing on padding; position_ids that start anew, cu_seq_lens_q or seq_idx say where.
Shape letters: B rows, T tokens, R texts of similar length, L tokens of the longest of them.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sequences import runs_of_similar_length


class Pieces(NamedTuple):
    """Texts as rows of their own.

    runs: for texts of similar length, [R, L], which of the B * T tokens theirs are, B * T standing for padding on the
    right. places: [B * T], where in the runs each token is. last: [B], which text of the runs is each row's last.
    """

    runs: tuple[torch.Tensor, ...]
    places: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class Texts:
    """The texts in rows [B, T].

    starts: boolean [B, T], True at the first token of each text but a row's first. numbers: int32 [B, T], of the text
    in its row that each token is of, from 0. Kernels that know texts read these alone, whose shapes tell nothing of
    them; everything else reads the texts as `pieces`.
    """

    starts: torch.Tensor
    numbers: torch.Tensor

    @functools.cached_property
    def pieces(self) -> Pieces:
        """Waits for the device, once."""
        return _pieces(self.starts)

    def cut(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [B, T, ...] as a tensor [R, L, ...] for each run, zero (or False) at padding."""
        tokens = x.flatten(0, 1)
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:1])])
        return [tokens.index_select(0, run.flatten()).unflatten(0, run.shape) for run in self.pieces.runs]

    def paste(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        """The inverse of cut."""
        tokens = torch.cat([piece.flatten(0, 1) for piece in pieces])
        return tokens.index_select(0, self.pieces.places).unflatten(0, self.starts.shape)

    def at_row_ends(self, states: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of states [R, ...] after each run, those of every row's last text, [B, ...]."""
        return torch.cat(list(states)).index_select(0, self.pieces.last)

    def in_same_text(self) -> torch.Tensor:
        """Boolean [B, T, T], True where two tokens of a row are of one text."""
        return self.numbers[:, :, None] == self.numbers[:, None, :]

    def in_last_text(self) -> torch.Tensor:
        """Boolean [B, T], True in each row's last text."""
        return self.numbers == self.numbers[:, -1:]

    def positions_in_text(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions [B or 1, T] that never fall along a row, counted from each text's start instead: [B, T]."""
        return positions - torch.where(self.starts, positions, 0).cummax(1).values

    def to(self, *args, **kwargs) -> "Texts":
        """These texts on another device."""
        return Texts(*(x.to(*args, **kwargs) for x in (self.starts, self.numbers)))


@torch.compiler.disable  # each batch has texts of other lengths
def run_text_by_text(function: Callable, texts: Texts, *tensors: torch.Tensor):
    """function(*tensors), tensors [B, T, ...], on each text by itself: its outputs, and its rows' states, which are a
    tensor [B, ...] or a tuple of them."""
    pieces = zip(*map(texts.cut, tensors), strict=True)
    outs, states = zip(*(function(*piece) for piece in pieces), strict=True)
    if isinstance(states[0], torch.Tensor):
        return texts.paste(outs), texts.at_row_ends(states)
    return texts.paste(outs), tuple(texts.at_row_ends(each) for each in zip(*states, strict=True))


def mix_rows(mixer: Callable, x: torch.Tensor, state, v_first: torch.Tensor | None, shared, *, reads_texts: bool):
    """mixer(x, state, v_first, shared), text by text if rows hold several and the time mixer does not read them."""
    if shared.texts is None or reads_texts:
        return mixer(x, state, v_first, shared)
    return _mix_texts(mixer, x, v_first, shared)


def _mix_texts(mixer: Callable, x: torch.Tensor, v_first: torch.Tensor | None, shared):
    texts, shape = shared.texts, x.shape[:2]
    real = x.new_ones(shape, dtype=torch.bool) if shared.token_mask is None else shared.token_mask
    tables = (table.expand(*shape, -1) for table in (shared.cos, shared.sin))
    columns = [texts.cut(each) for each in (x, *tables, real)]
    columns.append([None] * len(texts.pieces.runs) if v_first is None else texts.cut(v_first))
    mixed = [
        mixer(x_run, None, v_run, replace(shared, cos=cos, sin=sin, token_mask=mask, attention_mask=None, texts=None))
        for x_run, cos, sin, mask, v_run in zip(*columns, strict=True)
    ]
    ys, states, values = zip(*mixed, strict=True)
    state = type(states[0])(
        *(None if each[0] is None else texts.at_row_ends(each) for each in zip(*states, strict=True))
    )
    return texts.paste(ys), state, None if values[0] is None else texts.paste(values)


@torch.compiler.disable
def find_texts(
    hidden: torch.Tensor,
    token_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> Texts | None:
    """The texts in rows whose embeddings are `hidden` [B, T, C]; None if each row holds one. Waits for the device.

    A text begins where a real token's position is not above that of the real token before (position_ids [B or 1, T]),
    where seq_idx [B, T] changes, and at each of cu_seq_lens [texts + 1], which counts through all rows. ValueError for
    other shapes.
    """
    if position_ids is None and cu_seq_lens is None and seq_idx is None:
        return None
    shape = hidden.shape[:2]
    real = hidden.new_ones(shape, dtype=torch.bool) if token_mask is None else token_mask
    newest = torch.where(real, torch.arange(shape[1], device=real.device), -1).cummax(1).values
    before = F.pad(newest[:, :-1], (1, 0), value=-1)  # the last real token before each
    starts = torch.zeros_like(real)
    if position_ids is not None:
        positions = position_ids.to(real.device).expand(shape)
        starts |= positions <= positions.gather(1, before.clamp(min=0))
    for numbers in _text_numbers(shape, cu_seq_lens, seq_idx):
        numbers = numbers.to(real.device)
        starts |= numbers != numbers.gather(1, before.clamp(min=0))
    starts &= real & (before >= 0)
    return texts_that_start_at(starts) if bool(starts.any()) else None


def _text_numbers(shape: torch.Size, cu_seq_lens: torch.Tensor | None, seq_idx: torch.Tensor | None):
    """What seq_idx and cu_seq_lens say, as a number for each token [B, T] that changes from text to text."""
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"seq_idx must be {list(shape)}, a number for each token, not {list(seq_idx.shape)}")
        yield seq_idx
    if cu_seq_lens is not None:
        num_tokens = shape.numel()
        if cu_seq_lens.ndim != 1 or cu_seq_lens[0] != 0 or cu_seq_lens[-1] != num_tokens:
            raise ValueError(f"cu_seq_lens_q must go from 0 to the {num_tokens} tokens of the input")
        tokens = torch.arange(num_tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        yield torch.searchsorted(cu_seq_lens, tokens, right=True).view(shape)


def texts_that_start_at(starts: torch.Tensor) -> Texts:
    """Texts from their first tokens (see Texts.starts)."""
    return Texts(starts, starts.cumsum(1, dtype=torch.int32))


def _pieces(starts: torch.Tensor) -> Pieces:
    B, T = starts.shape
    begins = F.pad(starts.cpu()[:, 1:], (1, 0), value=True).flatten().nonzero().flatten()
    lengths = begins.diff(append=torch.tensor([B * T]))
    lengths, order = lengths.sort(descending=True, stable=True)
    begins = begins[order]
    runs = [places.masked_fill(places < 0, B * T) for _, places in runs_of_similar_length(begins, lengths)]
    flat = torch.cat([run.flatten() for run in runs])
    places = torch.empty(B * T + 1, dtype=torch.long).scatter_(0, flat, torch.arange(len(flat)))[:-1]
    ends = begins + lengths
    last = (ends == torch.arange(1, B + 1)[:, None] * T).long().argmax(1)
    device = starts.device
    return Pieces(tuple(run.to(device) for run in runs), places.to(device), last.to(device))
