"""Where documents end within training rows: the texts that a stage's models run on, and the labels it learns from.

Belongs to the losses and not to the corpus: rows keep their tokens, order and number whatever is done here with them,
and what is decided is which positions count. Leaves running models to the stages.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from radlads.config.schema import TrainConfig
from radlads.data.binidx import BinIdxReader
from radlads.data.inspect_corpus import documents_ending_in
from radlads.model.configuration import RadladsConfig

# The label of a position that no loss counts, as in F.cross_entropy
UNCOUNTED = -100


@dataclass(frozen=True)
class Sequences:
    """Tokens to run models on, each row from its start. inputs: [B, T]. labels: [B, T], the token that follows, or
    UNCOUNTED. count: how many labels are not UNCOUNTED. numbers: int32 [B, T], of the text in its row that each input
    is of, which sees nothing of the others; None: rows are one text each."""

    inputs: torch.Tensor
    labels: torch.Tensor
    count: int
    numbers: torch.Tensor | None = None

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
    inputs, _, labels = _without_first_tokens(tokens, end_ids)
    yield Sequences(inputs, labels, _count(labels))


def rows_of_documents(tokens: torch.Tensor, *, end_ids: Sequence[int]) -> Iterator[Sequences]:
    """The rows with every document as a text of its own, the last label being its end. Waits for the device.

    The end of a document is an input too, which nothing else sees and whose label does not count.
    """
    inputs, is_end, labels = _without_first_tokens(tokens, end_ids)
    numbers = is_end.cumsum(1, dtype=torch.int32) - is_end.int()
    yield Sequences(inputs, labels, _count(labels), numbers)


def _without_first_tokens(tokens: torch.Tensor, end_ids: Sequence[int]):
    """Inputs, which of them end a document, and labels, of which those that follow an end do not count."""
    inputs = tokens[:, :-1]
    is_end = torch.isin(inputs, torch.tensor(end_ids, dtype=tokens.dtype, device=tokens.device))
    return inputs, is_end, tokens[:, 1:].masked_fill(is_end, UNCOUNTED)


def _count(labels: torch.Tensor) -> int:
    return int((labels != UNCOUNTED).sum())


def cut_of(train: TrainConfig, end_ids: Sequence[int], *, masks: bool = True) -> Cut:
    """How a stage cuts its rows. masks: whether its loss is about labels, so that mask_labels_at_eos has a meaning."""
    if train.reset_state_at_eos:
        assert end_ids
        return functools.partial(rows_of_documents, end_ids=end_ids)
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
