"""Where documents end within training rows: the sequences that a stage's models run on, and the labels it learns from.

Belongs to the losses and not to the corpus: rows keep their tokens, order and number whatever is done here with them,
and what is decided is which positions count. Leaves running models to the stages.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from radlads.config.schema import TrainConfig
from radlads.data.binidx import BinIdxReader
from radlads.data.inspect_corpus import documents_ending_in
from radlads.model.configuration import RadladsConfig

# The label of a position that no loss counts, as in F.cross_entropy
UNCOUNTED = -100
# Recurrences run in chunks of 32 or 64: less padding would save no work, and shorter sequences would hold more states
_CHUNK = 64


@dataclass(frozen=True)
class Sequences:
    """Tokens to run models on, each row from its start. inputs: [B, T]. labels: [B, T], the token that follows, or
    UNCOUNTED. count: how many labels are not UNCOUNTED."""

    inputs: torch.Tensor
    labels: torch.Tensor
    count: int

    @property
    def counted(self) -> torch.Tensor | None:
        """Boolean [B, T], True where a loss counts; None if it counts everywhere."""
        return None if self.count == self.labels.numel() else self.labels != UNCOUNTED


Cut = Callable[[torch.Tensor], Iterable[Sequences]]
"""Makes sequences of a batch of rows [B, T + 1]."""


def whole_rows(tokens: torch.Tensor) -> Iterator[Sequences]:
    """The rows as they are, every label counting."""
    labels = tokens[:, 1:]
    yield Sequences(tokens[:, :-1], labels, labels.numel())


def rows_without_first_tokens(tokens: torch.Tensor, *, end_ids: Sequence[int]) -> Iterator[Sequences]:
    """The rows as they are, no label counting that follows one of `end_ids`. Waits for the device."""
    inputs = tokens[:, :-1]
    labels = tokens[:, 1:].masked_fill(_is_end(inputs, end_ids), UNCOUNTED)
    yield Sequences(inputs, labels, int((labels != UNCOUNTED).sum()))


def documents(tokens: torch.Tensor, *, end_ids: Sequence[int]) -> Iterator[Sequences]:
    """Every document in the rows as a sequence of its own, the last label being its end. Waits for the device.

    Documents of one token, where nothing can be predicted, are left out. The others come longest first, in runs of
    similar lengths, padded on the right, which a causal model cannot see. No run has more positions than the rows have.
    """
    num_rows, context = tokens.shape[0], tokens.shape[1] - 1
    # Row by row: tokens of two rows are no document
    left = [piece for row in tokens.cpu() for piece in _split(row, end_ids) if len(piece) > 1]
    left.sort(key=len, reverse=True)
    while left:
        width = _width(left[0], context)
        at_most = num_rows * context // width
        # Every run reads all weights anew, so a little padding is cheaper than more runs
        num = sum(3 * _width(piece, context) >= 2 * width for piece in left[:at_most])
        yield _padded(left[:num], width, tokens.device)
        left = left[num:]


def _is_end(tokens: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    return torch.isin(tokens, torch.tensor(end_ids, dtype=tokens.dtype, device=tokens.device))


def _split(row: torch.Tensor, end_ids: Sequence[int]) -> Sequence[torch.Tensor]:
    """The pieces of a row [T + 1] after each end; some may be empty."""
    return torch.tensor_split(row, _is_end(row, end_ids).nonzero().flatten() + 1)


def _width(piece: torch.Tensor, context: int) -> int:
    """The inputs that a piece is padded to."""
    return min(context, math.ceil((len(piece) - 1) / _CHUNK) * _CHUNK)


def _padded(pieces: list[torch.Tensor], width: int, device: torch.device) -> Sequences:
    """Pieces of at most width + 1 tokens as rows of `width` inputs and labels."""
    rows = pad_sequence(pieces, batch_first=True, padding_value=UNCOUNTED)
    rows = F.pad(rows, (0, width + 1 - rows.shape[1]), value=UNCOUNTED)
    count = sum(len(piece) - 1 for piece in pieces)
    # An embedding needs some token at padding too
    inputs, labels = rows[:, :-1].clamp(min=0), rows[:, 1:]
    return Sequences(inputs.to(device), labels.to(device), count)


def cut_of(train: TrainConfig, end_ids: Sequence[int], *, masks: bool = True) -> Cut:
    """How a stage cuts its rows. masks: whether its loss is about labels, so that mask_labels_at_eos has a meaning."""
    if train.reset_state_at_eos:
        assert end_ids
        return functools.partial(documents, end_ids=end_ids)
    if train.mask_labels_at_eos and masks:
        assert end_ids
        return functools.partial(rows_without_first_tokens, end_ids=end_ids)
    return whole_rows


def document_ends(
    train: TrainConfig, models: Iterable[RadladsConfig], corpora: Iterable[BinIdxReader]
) -> tuple[int, ...]:
    """The tokens that end a document: train.eos_token_id, else those of the first of `models` that names one.

    For configurations that ask for documents. Raises ValueError if no model names one, or if no document of a corpus
    ends in one.
    """
    key = "reset_state_at_eos" if train.reset_state_at_eos else "mask_labels_at_eos"
    named = (model.eos_token_id for model in models if model.eos_token_id is not None)
    found = next(named, None) if train.eos_token_id < 0 else train.eos_token_id
    if found is None:
        raise ValueError(
            f"train.{key} is set, but the model names no end-of-text token: set train.eos_token_id to the one that "
            "the corpus was built with"
        )
    end_ids = (found,) if isinstance(found, int) else tuple(found)
    for reader in corpora:
        if not any(documents_ending_in(reader, end_id) for end_id in end_ids):
            raise ValueError(
                f"train.{key} is set, but no document of {reader.path_stem}.bin ends in token "
                f"{' or '.join(map(str, end_ids))}: set train.eos_token_id to the one that the corpus was built with"
            )
    return end_ids
