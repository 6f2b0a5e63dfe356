"""Text to measure on, as tokens: a corpus as it is, a text file, or held-out sources of the running Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

from radlads.convert.hf_source import end_of_text_id
from radlads.data.binidx import BinIdxReader
from radlads.data.build import build_binidx
from radlads.data.loader import check_vocabulary
from radlads.data.python_text import iter_documents

HELDOUT_SOURCES = "held-out sources of the running Python"
"""What is read where no text is given."""


@contextmanager
def text_corpus(
    text: Path | None, tokenizer: Tokenizer | None, tokenizer_folder: Path, vocab_size: int
) -> Iterator[BinIdxReader]:
    """The tokens of a .bin/.idx pair or a text file, None: of HELDOUT_SOURCES.

    A plain text is tokenised into a folder that ends with the context; a pair needs no tokenizer. Raises ValueError
    for a file that is neither, or is empty, and for tokens outside the vocabulary.
    """
    if text is not None and is_corpus(text):
        reader = BinIdxReader(text)
        check_vocabulary(reader, vocab_size, f"{reader.path_stem}.bin")
        yield reader
        return
    assert tokenizer is not None
    documents = [_text_of(text)] if text is not None else (text for _, text in iter_documents("heldout"))
    with TemporaryDirectory() as folder:
        stem, eos = Path(folder) / "text", end_of_text_id(tokenizer_folder, tokenizer)
        build_binidx(documents, tokenizer, stem, vocab_size=vocab_size, eos_token_id=eos)
        yield BinIdxReader(stem)


def is_corpus(text: Path) -> bool:
    """Whether this names a .bin/.idx pair, with its extension or without."""
    return text.suffix in (".bin", ".idx") or text.with_name(f"{text.name}.idx").is_file()


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: give a text file, or a .bin/.idx pair") from error
    if not text:
        raise ValueError(f"{path} is empty: give another --text")
    return text
