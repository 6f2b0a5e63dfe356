"""Text to a token corpus: encodes documents and writes them as `.bin` and `.idx`.

Owns the batching, the EOS after each document and the limit on tokens. Leaves the format to `binidx.py`, and where the
text comes from to the caller.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from radlads.data.binidx import BinIdxWriter


@dataclass(frozen=True)
class BuiltCorpus:
    """What was written: tokens with every EOS, documents, and the UTF-8 bytes of text that the tokens stand for."""

    num_tokens: int
    num_documents: int
    num_bytes: int


def build_binidx(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    path_stem: str | Path,
    *,
    vocab_size: int,
    eos_token_id: int,
    max_tokens: int | None = None,
    batch_documents: int = 256,
) -> BuiltCorpus:
    """Encode `documents`, each followed by one EOS, into `path_stem`.bin and .idx; nothing is left there on an error.

    Stops at `max_tokens`, cutting the last document short (it still ends in EOS). No special tokens are added, and the
    tokenizer's own padding and truncation are ignored. Raises ValueError if an id is not below `vocab_size` or if
    there is no document.
    """
    _check_id(eos_token_id, vocab_size)
    num_bytes = 0
    with BinIdxWriter(path_stem, vocab_size) as writer:
        for text, encoding in _encode(documents, _without_padding_or_truncation(tokenizer), batch_documents):
            ids = encoding.ids
            if max_tokens is not None:
                room = max_tokens - writer.num_tokens - 1
                if room < 1:
                    break
                if room < len(ids):
                    ids, text = ids[:room], text[: encoding.offsets[room - 1][1]]
            _check_id(max(ids, default=0), vocab_size)
            writer.add_document([*ids, eos_token_id])
            num_bytes += len(text.encode())
    return BuiltCorpus(writer.num_tokens, writer.num_documents, num_bytes)


def _encode(documents: Iterable[str], tokenizer: Tokenizer, batch_documents: int) -> Iterator[tuple[str, Encoding]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, batch_documents)):
        yield from zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True)


def _without_padding_or_truncation(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    copied = Tokenizer.from_str(tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    return copied


def _check_id(token_id: int, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise ValueError(
            f"tokenizer and model do not match: token id {token_id} is beyond the model's vocabulary of {vocab_size}, "
            "so use the tokenizer from the model's own folder"
        )
