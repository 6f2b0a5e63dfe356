"""Rows that hold several texts, one after another: where each begins, and running a recurrence on each by itself.

Trainers pack rows to waste nothing on padding; position_ids that start anew, cu_seq_lens_q or seq_idx say where.
Shape letters: B rows, T tokens, R texts of similar length, L tokens of the longest of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Texts:
    """The texts in rows [B, T].

    starts: boolean [B, T], True at the first token of each text but a row's first. runs: for texts of similar length,
    [R, L], which of the B * T tokens theirs are, B * T standing for padding on the right. places: [B * T], where in the
    runs each token is. last: [B], which text of the runs is each row's last.
    """

    starts: torch.Tensor
    runs: tuple[torch.Tensor, ...]
    places: torch.Tensor
    last: torch.Tensor

    def cut(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [B, T, ...] as a tensor [R, L, ...] for each run, zero (or False) at padding."""
        tokens = x.flatten(0, 1)
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:1])])
        return [tokens.index_select(0, run.flatten()).unflatten(0, run.shape) for run in self.runs]

    def paste(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        """The inverse of cut."""
        tokens = torch.cat([piece.flatten(0, 1) for piece in pieces])
        return tokens.index_select(0, self.places).unflatten(0, self.starts.shape)

    def at_row_ends(self, states: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of states [R, ...] after each run, those of every row's last text, [B, ...]."""
        return torch.cat(list(states)).index_select(0, self.last)

    def in_same_text(self) -> torch.Tensor:
        """Boolean [B, T, T], True where two tokens of a row are of one text."""
        numbers = self.starts.cumsum(1)
        return numbers[:, :, None] == numbers[:, None, :]

    def in_last_text(self) -> torch.Tensor:
        """Boolean [B, T], True in each row's last text."""
        numbers = self.starts.cumsum(1)
        return numbers == numbers[:, -1:]

    def positions_in_text(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions [B or 1, T] that never fall along a row, counted from each text's start instead: [B, T]."""
        return positions - torch.where(self.starts, positions, 0).cummax(1).values

    def to(self, *args, **kwargs) -> "Texts":
        """These texts on another device."""
        starts, places, last = (x.to(*args, **kwargs) for x in (self.starts, self.places, self.last))
        return Texts(starts, tuple(run.to(*args, **kwargs) for run in self.runs), places, last)


def recur(recurrence: Callable, texts: Texts | None, tensors: Iterable[torch.Tensor], state: torch.Tensor | None):
    """recurrence(*tensors, state), tensors [B, T, ...], starting anew at each text: outputs, and the rows' states."""
    if texts is None:
        return recurrence(*tensors, state)
    assert state is None, "packed rows start without a state"
    pieces = zip(*map(texts.cut, tensors), strict=True)
    outs, states = zip(*(recurrence(*piece, None) for piece in pieces), strict=True)
    return texts.paste(outs), texts.at_row_ends(states)


def mix_texts(mixer: Callable, x: torch.Tensor, v_first: torch.Tensor | None, shared):
    """What a time mixer that knows nothing of texts gives for each of shared.texts by itself."""
    texts, shape = shared.texts, x.shape[:2]
    real = x.new_ones(shape, dtype=torch.bool) if shared.token_mask is None else shared.token_mask
    tables = (table.expand(*shape, -1) for table in (shared.cos, shared.sin))
    columns = [texts.cut(each) for each in (x, *tables, real)]
    columns.append([None] * len(texts.runs) if v_first is None else texts.cut(v_first))
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
    B, T = starts.shape
    begins = F.pad(starts.cpu()[:, 1:], (1, 0), value=True).flatten().nonzero().flatten()
    lengths = begins.diff(append=torch.tensor([B * T]))
    lengths, order = lengths.sort(descending=True, stable=True)
    begins = begins[order]
    runs, done = [], 0
    while done < len(lengths):
        # Padding of up to half a text costs less than more runs do
        num = int((3 * lengths[done:] >= 2 * lengths[done]).sum())
        columns = torch.arange(int(lengths[done]))
        run = begins[done : done + num, None] + columns
        runs.append(run.masked_fill(columns >= lengths[done : done + num, None], B * T))
        done += num
    flat = torch.cat([run.flatten() for run in runs])
    places = torch.empty(B * T + 1, dtype=torch.long).scatter_(0, flat, torch.arange(len(flat)))[:-1]
    ends = begins + lengths
    last = (ends == torch.arange(1, B + 1)[:, None] * T).long().argmax(1)
    device = starts.device
    return Texts(starts, tuple(run.to(device) for run in runs), places.to(device), last.to(device))
