"""Conversations to a token corpus with a mask: every conversation a document, and what its assistant wrote marked.

Leaves to a Renderer how a conversation is spelt, and reading data sets to `datasets_source.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.conversations import Conversation, Message
from radlads.data.corpus_checksums import record_checksums
from radlads.data.inspect_corpus import document_tokens
from radlads.data.mask import has_mask, read_mask


class Rendered(NamedTuple):
    """A conversation as tokens up to the end of its last reply, and which of them the assistant wrote."""

    ids: list[int]
    mask: list[bool]


class Renderer(Protocol):
    """A chat template with its tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Beyond every id."""
        ...

    def rendered(self, messages: list[Message], tools: list[Any] | None = None) -> Rendered:
        """Raises ValueError for messages that the template refuses, or whose replies it does not show as asked for."""
        ...


@dataclass(frozen=True)
class BuiltChat:
    """What was written so far: tokens, those of the assistant among them, and conversations."""

    num_tokens: int = 0
    num_assistant: int = 0
    num_documents: int = 0


def build_chat(
    conversations: Iterable[Conversation],
    renderer: Renderer,
    path_stem: str | Path,
    *,
    max_tokens: int | None = None,
    on_progress: Callable[[BuiltChat], None] = lambda so_far: None,
) -> BuiltChat:
    """Write conversations into `path_stem`.bin, .idx and .mask, with their hashes; nothing is left there on an error.

    Stops before the conversation that would go beyond `max_tokens`. Raises ValueError as the renderer does, and if
    there is no conversation.
    """
    documents = (renderer.rendered(each.messages, each.tools) for each in conversations)
    return write_chat(
        documents, path_stem, vocab_size=renderer.vocab_size, max_tokens=max_tokens, on_progress=on_progress
    )


def write_chat(
    documents: Iterable[Rendered],
    path_stem: str | Path,
    *,
    vocab_size: int,
    max_tokens: int | None = None,
    on_progress: Callable[[BuiltChat], None] = lambda so_far: None,
) -> BuiltChat:
    """As build_chat, of conversations that are tokens already."""
    so_far = BuiltChat()
    with BinIdxWriter(path_stem, vocab_size, masked=True) as writer:
        for document in documents:
            if max_tokens is not None and writer.num_tokens + len(document.ids) > max_tokens:
                break
            writer.add_document(np.array(document.ids, dtype=np.int64), document.mask)
            num_assistant = so_far.num_assistant + sum(document.mask)
            so_far = BuiltChat(writer.num_tokens, num_assistant, writer.num_documents)
            on_progress(so_far)
    reader = BinIdxReader(path_stem)
    if int(read_mask(reader).sum()) != so_far.num_assistant:
        raise ValueError(
            f"{reader.path_stem}: what was written is not what is read: check the disk, and build it again"
        )
    record_checksums(reader.path_stem)
    return so_far


def describe_mask(reader: BinIdxReader) -> list[str]:
    """Lines that say who wrote how much of a corpus with a mask; none of one without."""
    if not has_mask(reader):
        return []
    mask, num_documents = read_mask(reader), reader.num_documents
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    # A reply that a document begins with goes on from none before
    num_replies = len(np.union1d(starts, np.intersect1d(reader.document_starts()[:-1], np.flatnonzero(mask))))
    written, tokens = int(mask.sum()), document_tokens(reader)
    return [
        f"the assistant wrote {written:,} tokens, {written / reader.num_tokens:.1%} of all, in {num_replies:,} replies "
        f"of {written / max(1, num_replies):,.0f} on average",
        f"a conversation has {num_replies / num_documents:.2f} replies and {tokens.mean():,.0f} tokens on average, "
        f"{tokens.max():,} at most",
    ]
