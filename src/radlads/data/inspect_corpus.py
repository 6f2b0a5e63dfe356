"""What a token corpus holds, and mending its ends: `radlads data info`, `check` and `fixeos`.

Owns counting and the EOS at the end of documents. Leaves the format to `binidx.py`, printing to the command line.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radlads.data.binidx import BinIdxReader, corpus_files
from radlads.data.corpus_checksums import forget_checksums, record_checksums
from radlads.data.sampling import magic_prime

_EXCERPT_TOKENS = 32
USUAL_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class LengthBin:
    """Documents of at least `first` and at most `last` tokens."""

    first: int
    last: int
    num_documents: int


def document_tokens(reader: BinIdxReader) -> NDArray[np.int64]:
    """Tokens of every document, `[num_documents]`, EOS included."""
    return np.diff(reader.document_starts())


def length_histogram(reader: BinIdxReader) -> list[LengthBin]:
    """Documents by length, in powers of two from the shortest to the longest; 0 tokens are a bin of their own."""
    # frexp gives the exponent e with 2^(e-1) <= n < 2^e, and 0 for 0
    counts = np.bincount(np.frexp(document_tokens(reader))[1])
    filled = np.flatnonzero(counts)
    return [
        LengthBin(2 ** (e - 1) if e else 0, 2**e - 1, int(counts[e]))
        for e in range(int(filled[0]), int(filled[-1]) + 1)
    ]


def magic_primes(num_tokens: int, contexts: tuple[int, ...] = USUAL_CONTEXTS) -> dict[int, int]:
    """The magic prime of each context length that the corpus is long enough for."""
    return {context: magic_prime(num_tokens, context) for context in contexts if num_tokens >= 3 * context}


def documents_ending_in(reader: BinIdxReader, token_id: int) -> int:
    """How many documents end in `token_id`."""
    return int((reader.tokens[_last_positions(reader)] == token_id).sum())


def replace_trailing(reader: BinIdxReader, *, old: int, new: int) -> int:
    """Put `new` where a document ends in `old`, and return in how many: `.bin` is written anew and renamed at the end.

    Raises ValueError if `new` does not fit the corpus's dtype.
    """
    limits = np.iinfo(reader.dtype)
    if not limits.min <= new <= limits.max:
        raise ValueError(
            f"{reader.path_stem}.bin holds {reader.dtype} tokens, which token {new} does not fit: build it again"
        )
    positions = _last_positions(reader)
    positions = positions[reader.tokens[positions] == old]
    if positions.size and old != new:
        _rewrite(reader, positions, new)
    return int(positions.size)


def describe(reader: BinIdxReader, contexts: tuple[int, ...], decode: Callable[[list[int]], str] | None) -> list[str]:
    """Lines that say what a corpus is: sizes, magic primes, and its first and last document.

    `decode` turns ids into text; None shows the ids.
    """
    primes = magic_primes(reader.num_tokens, contexts)
    return [
        f"{reader.path_stem}: {reader.num_tokens:,} tokens in {reader.num_documents:,} documents, {reader.dtype}",
        *(
            f"magic prime {primes.get(context, 'none, the corpus is too short')} at ctx_len {context}"
            for context in contexts
        ),
        *(
            f"{name} document, {_excerpt(reader.document(i).tolist(), decode)}"
            for name, i in (("first", 0), ("last", -1))
        ),
    ]


def _excerpt(ids: list[int], decode: Callable[[list[int]], str] | None) -> str:
    start, end = (ids, []) if len(ids) <= 2 * _EXCERPT_TOKENS else (ids[:_EXCERPT_TOKENS], ids[-_EXCERPT_TOKENS:])
    shown = [repr(decode(part)) if decode else " ".join(map(str, part)) for part in (start, end) if part]
    return f"{len(ids):,} tokens: {' ... '.join(shown)}"


def _last_positions(reader: BinIdxReader) -> NDArray[np.int64]:
    starts = reader.document_starts()
    return starts[1:][np.diff(starts) > 0] - 1


def _rewrite(reader: BinIdxReader, positions: NDArray[np.int64], token_id: int) -> None:
    path, _ = corpus_files(reader.path_stem)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    block_tokens = 2**22
    try:
        with open(temporary, "wb") as file:
            for start in range(0, reader.num_tokens, block_tokens):
                block: NDArray[Any] = np.array(reader.tokens[start : start + block_tokens])
                here = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + block.size)]
                block[here - start] = token_id
                file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
        had_checksums = forget_checksums(reader.path_stem)
        os.replace(temporary, path)
        if had_checksums:
            record_checksums(reader.path_stem)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
