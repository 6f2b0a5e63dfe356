"""Text to a token corpus: encodes documents and writes them as `.bin` and `.idx`.

Owns the batching, the worker processes, the EOS after each document and the limit on tokens. Leaves the format to
`binidx.py`, and where the text comes from to the caller.
"""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from radlads.data.binidx import BinIdxReader, BinIdxWriter, corpus_files
from radlads.data.corpus_checksums import record_checksums

Ids = NDArray[np.int32]

_BATCH_CHARACTERS = 2**20
_BATCHES_AHEAD = 4  # per process: enough that none waits for the reader, few enough to keep memory flat


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
    processes: int = 1,
    special_tokens_as_text: bool = False,
    on_progress: Callable[[BuiltCorpus], None] = lambda so_far: None,
) -> BuiltCorpus:
    """Encode `documents`, each followed by one EOS, into `path_stem`.bin and .idx; nothing is left there on an error.
    Their hashes go into `path_stem`.checksums.json.

    Stops at `max_tokens`, cutting the last document short (it still ends in EOS). No special tokens are added, and the
    tokenizer's own padding and truncation are ignored. The literal text of a special token, such as <|endoftext|>,
    becomes that token, or with `special_tokens_as_text` tokens of plain text. `processes` > 1 encodes in that many
    worker processes and gives the same files. The first and the last document are read back and compared. Raises
    ValueError if an id is not below `vocab_size`, if there is no document, or if a worker dies.
    """
    _check_id(eos_token_id, vocab_size)
    tokenizer = _plain(tokenizer, eos_token_id, special_tokens_as_text=special_tokens_as_text)
    num_bytes = 0
    ends: dict[int, Ids] = {}  # the first document, and as last entry the last one
    with (
        BinIdxWriter(path_stem, vocab_size) as writer,
        closing(_encoded_batches(_batches(documents, batch_documents), tokenizer, processes)) as batches,
    ):
        full = False
        for texts, encoded in batches:
            for text, ids in zip(texts, encoded, strict=True):
                room = ids.size if max_tokens is None else max_tokens - writer.num_tokens - 1
                full = room < 1 and max_tokens is not None
                if full:
                    break
                if room < ids.size:
                    ids, text = ids[:room], _text_of(text, tokenizer, room)
                _check_id(int(ids.max(initial=0)), vocab_size)
                document = np.append(ids, np.int32(eos_token_id))
                ends = {0: ends.get(0, document), writer.num_documents: document}
                writer.add_document(document)
                num_bytes += len(text.encode())
            on_progress(BuiltCorpus(writer.num_tokens, writer.num_documents, num_bytes))
            if full:
                break
    _verify(BinIdxReader(path_stem), writer, ends)
    record_checksums(writer.path_stem)
    return BuiltCorpus(writer.num_tokens, writer.num_documents, num_bytes)


def _batches(documents: Iterable[str], batch_documents: int) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == batch_documents or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded_batches(
    batches: Iterator[list[str]], tokenizer: Tokenizer, processes: int
) -> Generator[tuple[list[str], list[Ids]]]:
    """Every batch with its documents' ids, in the order of `batches` whatever the number of processes."""
    if processes == 1:
        yield from ((texts, _encode(tokenizer, texts)) for texts in batches)
        return
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, tokenizer.encode_special_tokens),
    )
    waiting: deque[tuple[list[str], Future[list[Ids]]]] = deque()
    try:
        for texts in batches:
            waiting.append((texts, pool.submit(_encode_in_worker, texts)))
            if len(waiting) == _BATCHES_AHEAD * processes:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool as error:
        raise ValueError("a tokenising process died, perhaps for lack of memory: use fewer processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(texts: list[str], encoded: "Future[list[Ids]]") -> tuple[list[str], list[Ids]]:
    return texts, encoded.result()


def _start_worker(tokenizer: Tokenizer, special_tokens_as_text: bool) -> None:
    # Ctrl-C reaches the whole process group; the parent stops the workers in its own time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    _worker_tokenizer.encode_special_tokens = special_tokens_as_text  # which is lost on the way to another process


_worker_tokenizer: Tokenizer


def _encode_in_worker(texts: list[str]) -> list[Ids]:
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _text_of(text: str, tokenizer: Tokenizer, num_tokens: int) -> str:
    """The beginning of `text` that its first `num_tokens` tokens stand for."""
    return text[: tokenizer.encode(text, add_special_tokens=False).offsets[num_tokens - 1][1]]


def _verify(reader: BinIdxReader, written: BinIdxWriter, ends: dict[int, Ids]) -> None:
    """Remove the files and raise ValueError unless they hold as many documents as were written, and these ones."""
    if (reader.num_documents, reader.num_tokens) == (written.num_documents, written.num_tokens) and all(
        np.array_equal(reader.document(i), ids) for i, ids in ends.items()
    ):
        return
    for path in corpus_files(reader.path_stem):
        path.unlink()
    raise ValueError(f"{reader.path_stem}: what was written is not what is read: check the disk, and build it again")


def _plain(tokenizer: Tokenizer, eos_token_id: int, *, special_tokens_as_text: bool) -> Tokenizer:
    """A tokenizer that neither pads nor truncates; with `special_tokens_as_text` no text gives it a special token, nor
    the one that ends documents, special or not."""
    if tokenizer.padding is None and tokenizer.truncation is None and not special_tokens_as_text:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    for added in content["added_tokens"]:
        added["special"] |= special_tokens_as_text and added["id"] == eos_token_id
    copied = Tokenizer.from_str(json.dumps(content))
    copied.no_padding()
    copied.no_truncation()
    copied.encode_special_tokens = special_tokens_as_text
    return copied


def _check_id(token_id: int, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise ValueError(
            f"tokenizer and model do not match: token id {token_id} is beyond the model's vocabulary of {vocab_size}, "
            "so use the tokenizer from the model's own folder"
        )
