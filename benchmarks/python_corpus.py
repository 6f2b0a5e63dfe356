"""The Python sources of this interpreter as a token corpus, with whole packages held out.

Owns which files count, the split, the tokenizer and tokenising in worker processes. Imports no torch, so that the
workers, which are forked, stay small.
"""

import hashlib
import json
import multiprocessing
import os
import sysconfig
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from radlads.data.binidx import BinIdxWriter

END_OF_TEXT = "<|endoftext|>"
CORPUS = "corpus.json"
HELDOUT_SHARE = 0.025
# No held-out package may be more than this share of the held-out text, so that no single one decides the figures
LARGEST_PACKAGE = 0.2
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "idle_test"}
_MIN_BYTES, _MAX_BYTES = 400, 800_000
_DISTINCTIVE_CHARACTERS = 20
_BATCH_BYTES = 1_000_000


class Source(NamedTuple):
    """A Python file and the top-level package it belongs to, by name, wherever that is installed."""

    package: str
    path: Path
    num_bytes: int


def interpreter_roots() -> list[Path]:
    """The standard library's folder and those of the installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[kind]).resolve() for kind in ("stdlib", "purelib", "platlib")))


def find_sources(roots: Iterable[Path]) -> list[Source]:
    """Every .py file of 400 bytes .. 800 kB below the roots, by package and path: related files are neighbours.

    Names count without leading underscores and extension, so that `_pytest` and `pytest`, or a module and its C
    companion, are one package. Raises ValueError if there is none.
    """
    sources = [source for root in roots for source in _sources_below(root)]
    if not sources:
        raise ValueError(f"no Python sources below {', '.join(map(str, roots))}: name other folders with --text")
    return sorted(sources, key=lambda source: (source.package, source.path))


def _sources_below(root: Path) -> Iterator[Source]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if path.suffix != ".py" or not path.is_file():
                continue
            num_bytes = path.stat().st_size
            if _MIN_BYTES <= num_bytes <= _MAX_BYTES:
                top = path.relative_to(root).parts[0].removesuffix(".py")
                yield Source(top.lstrip("_") or top, path, num_bytes)


def held_out_packages(sources: Iterable[Source]) -> frozenset[str]:
    """Whole packages, in the order of their names' hashes, until they hold HELDOUT_SHARE of the bytes.

    Raises ValueError if every package is too large to be held out.
    """
    sizes: dict[str, int] = defaultdict(int)
    for source in sources:
        sizes[source.package] += source.num_bytes
    wanted_bytes = HELDOUT_SHARE * sum(sizes.values())
    chosen: set[str] = set()
    held_bytes = 0
    for package in sorted(sizes, key=_order):
        if held_bytes >= wanted_bytes:
            break
        if sizes[package] <= LARGEST_PACKAGE * wanted_bytes:
            chosen.add(package)
            held_bytes += sizes[package]
    if not chosen:
        raise ValueError(f"none of the {len(sizes)} packages is small enough to be held out: name more text")
    return frozenset(chosen)


def _order(package: str) -> bytes:
    return hashlib.blake2b(package.encode(), digest_size=8).digest()


def distinctive_lines(text: str) -> set[int]:
    """Checksums of the lines of 20 characters and more, without the spaces around them."""
    lines = (line.strip() for line in text.splitlines())
    return {zlib.crc32(line.encode()) for line in lines if len(line) >= _DISTINCTIVE_CHARACTERS}


def copies(text: str, heldout_lines: set[int]) -> bool:
    """Whether more than half of a text's distinctive lines are held-out ones: a vendored or renamed copy."""
    lines = distinctive_lines(text)
    return len(lines & heldout_lines) > len(lines) / 2


def build_corpus(
    out: Path, roots: Iterable[Path], *, vocab_size: int, sample_bytes: int, workers: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write out/{train,heldout}.{bin,idx} and out/tokenizer.json and return what they hold; a finished corpus is kept.

    The tokenizer is trained on `sample_bytes` of the training text. Training files that copy held-out ones, or each
    other byte by byte, are left out. Raises ValueError if `out` holds a corpus of another vocabulary.
    """
    if (out / CORPUS).is_file():
        facts = json.loads((out / CORPUS).read_text())
        if facts["vocab_size"] != vocab_size:
            raise ValueError(f"{out} holds a corpus with {facts['vocab_size']} tokens of vocabulary: remove it")
        tell(f"data: kept what is in {out}")
        return facts
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    sources = find_sources(roots)
    packages = held_out_packages(sources)
    heldout = [source for source in sources if source.package in packages]
    candidates = [source for source in sources if source.package not in packages]
    heldout_lines = set().union(*(distinctive_lines(read(source.path) or "") for source in heldout))
    # The workers are forked here, before the tokenizer's training starts threads
    with _workers(workers, heldout_lines) as pool:
        fresh = _without_copies(pool, candidates)
        tell(
            f"data: {len(fresh):,} training files of {sum(source.num_bytes for source in fresh) / 1e6:.0f} MB, "
            f"{len(candidates) - len(fresh):,} copies left out; {len(heldout):,} files held out "
            f"({len(packages)} packages), {time.monotonic() - began:.0f} s"
        )
        tokenizer = train_tokenizer(sample_texts(fresh, sample_bytes), vocab_size)
        tokenizer.save(str(out / "tokenizer.json"))
        tell(f"data: tokenizer of {tokenizer.get_vocab_size():,} trained, {time.monotonic() - began:.0f} s")
        facts = {"vocab_size": vocab_size, "heldout_packages": sorted(packages)}
        for split, files in (("train", fresh), ("heldout", heldout)):
            facts[split] = _write_split(pool, out / split, files, out / "tokenizer.json", tokenizer)
            tell(f"data: {split} has {facts[split]['tokens']:,} tokens, {time.monotonic() - began:.0f} s")
    facts["copies_left_out"] = len(candidates) - len(fresh)
    facts["seconds"] = time.monotonic() - began
    (out / CORPUS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def read(path: Path) -> str | None:
    """A file's text; None if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def sample_texts(sources: list[Source], sample_bytes: int) -> Iterator[str]:
    """Texts spread over all sources, about `sample_bytes` in sum."""
    total = sum(source.num_bytes for source in sources)
    stride = max(1, round(total / sample_bytes))
    return (text for source in sources[::stride] if (text := read(source.path)))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that keeps runs of spaces together, digits apart, and words with their leading space."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+ *|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(pattern=Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _without_copies(pool: ProcessPoolExecutor, sources: list[Source]) -> list[Source]:
    batches = list(_batches(sources))
    digests_of = pool.map(_screen, [[source.path for source in batch] for batch in batches])
    seen: set[bytes] = set()
    fresh = []
    for batch, digests in zip(batches, digests_of, strict=True):
        for source, digest in zip(batch, digests, strict=True):
            if digest is not None and digest not in seen:
                seen.add(digest)
                fresh.append(source)
    return fresh


def _write_split(
    pool: ProcessPoolExecutor, stem: Path, sources: list[Source], tokenizer_file: Path, tokenizer: Tokenizer
) -> dict[str, int]:
    batches = [[source.path for source in batch] for batch in _batches(sources)]
    num_bytes = 0
    with BinIdxWriter(stem, tokenizer.get_vocab_size()) as writer:
        for documents, batch_bytes in pool.map(_encode, batches, [str(tokenizer_file)] * len(batches)):
            num_bytes += batch_bytes
            for ids in documents:
                writer.add_document(ids)
    return {"files": writer.num_documents, "bytes": num_bytes, "tokens": writer.num_tokens}


def _batches(sources: list[Source]) -> Iterator[list[Source]]:
    batch: list[Source] = []
    for source in sources:
        batch.append(source)
        if sum(each.num_bytes for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


# What the workers run. Their held-out lines are inherited through the fork, not sent.

_heldout_lines: set[int] = set()


def _workers(count: int, heldout_lines: set[int]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(heldout_lines,))


def _start_worker(heldout_lines: set[int]) -> None:
    global _heldout_lines
    _heldout_lines = heldout_lines
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _screen(paths: list[Path]) -> list[bytes | None]:
    """A digest of each text, None for one that is no UTF-8 or copies held-out text."""
    texts = [read(path) for path in paths]
    return [
        None
        if text is None or copies(text, _heldout_lines)
        else hashlib.blake2b(text.encode(), digest_size=16).digest()
        for text in texts
    ]


def _encode(paths: list[Path], tokenizer_file: str) -> tuple[list[NDArray[np.uint16]], int]:
    """Each text's ids with end-of-text behind them, and the texts' UTF-8 bytes."""
    tokenizer = _tokenizer(tokenizer_file)
    texts = [text for path in paths if (text := read(path)) is not None]
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    documents = [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings]
    return documents, sum(len(text.encode()) for text in texts)


@cache
def _tokenizer(file: str) -> Tokenizer:
    return Tokenizer.from_file(file)
