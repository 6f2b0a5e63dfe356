"""`radlads data`: its options, and what it does with a corpus. Imports nothing slow before it has to.

Tokenizers come from whoever calls, as CorpusTokenizer: what a model folder's is belongs to convert/.
"""

import argparse
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radlads.console import Console

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from radlads.data.build import BuiltCorpus
    from radlads.data.build_chat import BuiltChat, Renderer

_BAR_WIDTH = 40


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer, the id that ends its documents, and how many ids there are."""

    tokenizer: "Tokenizer"
    eos: int
    vocab_size: int

    def text_of(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


OpenTokenizer = Callable[[str], CorpusTokenizer]
OpenRenderer = Callable[[str], "Renderer"]


def add_info_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads data info`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a .bin/.idx pair, with or without the extension")
    parser.add_argument("--tokenizer", help="folder or hub name, to show the first and last document as text")


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads data check` and `fixeos`, and of make_data_hf.py."""
    parser.add_argument("--dataset", required=True, help="a jsonl, csv, parquet or text file, a folder, or a hub name")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json, or a hub name")
    parser.add_argument("--ctxlen", type=int, default=512, help="tokens a sample, for the magic prime (default 512)")
    parser.add_argument(
        "--column_name", default="text", help="where the text is, also as a path: meta.text (default text)"
    )
    parser.add_argument("--max_tokens", type=int, help="stop there, cutting the last document short")
    parser.add_argument("--out", type=Path, help="the corpus, without extension (default: the dataset's name, here)")
    parser.add_argument("--split", default="train", help="of a dataset that has several (default train)")
    parser.add_argument("--subset", help="the configuration of a hub dataset that has several")
    parser.add_argument("--processes", type=int, default=1, help="that tokenise (default 1, with tokenizers' threads)")
    parser.add_argument(
        "--text_unit",
        default="document",
        choices=["document", "paragraph", "line"],
        help="what of a plain text file is one document (default: all of it)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="end at a null or empty text (default: left out, counted)"
    )
    parser.add_argument(
        "--special_tokens_as_text",
        action="store_true",
        help="encode a literal <|endoftext|> in a document as plain text (default: as that token)",
    )


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads data build`."""
    add_corpus_options(parser)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="conversations: a column of messages (--column_name, default messages), by the tokenizer's chat template",
    )
    parser.add_argument(
        "--skip_faulty",
        action="store_true",
        help="of --chat: leave out conversations that do not alternate or have an empty message (default: an error)",
    )


def info_lines(arguments: argparse.Namespace, open_tokenizer: OpenTokenizer) -> Iterator[str]:
    """What a token corpus holds. Raises ValueError for a corpus or a tokenizer that cannot be read."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.build_chat import describe_mask
    from radlads.data.inspect_corpus import USUAL_CONTEXTS, describe, length_histogram

    reader = BinIdxReader(arguments.file)
    decode = open_tokenizer(arguments.tokenizer).text_of if arguments.tokenizer else None
    yield from describe(reader, USUAL_CONTEXTS, decode)
    yield from describe_mask(reader)
    histogram = length_histogram(reader)
    widest = max(each.num_documents for each in histogram)
    yield "documents by tokens"
    for each in histogram:
        bar = "#" * -(-_BAR_WIDTH * each.num_documents // widest)
        yield f"{each.first:>12,} to {each.last:>12,} {each.num_documents:>12,} {bar}"


def build_lines(arguments: argparse.Namespace, open_tokenizer: OpenTokenizer, console: Console) -> Iterator[str]:
    """Tokenise a dataset into NAME.bin and NAME.idx, and say what came of it, last what was left out.

    Raises ValueError for values out of range, and for a dataset or a tokenizer that cannot be read.
    """
    from radlads.data.binidx import BinIdxReader
    from radlads.data.build import build_binidx
    from radlads.data.datasets_source import open_documents
    from radlads.data.inspect_corpus import describe

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill removes temporary files, as Ctrl-C does
    _check(arguments)
    opened = open_tokenizer(arguments.tokenizer)
    source = open_documents(
        arguments.dataset,
        column=arguments.column_name,
        split=arguments.split,
        subset=arguments.subset,
        text_unit=arguments.text_unit,
        strict=arguments.strict,
    )
    began = time.monotonic()

    def show(so_far: "BuiltCorpus") -> None:
        done = max(
            so_far.num_documents / source.num_rows if source.num_rows else 0.0,
            so_far.num_tokens / arguments.max_tokens if arguments.max_tokens else 0.0,
        )
        console.progress(_progress(so_far, done, time.monotonic() - began))

    stem = corpus_stem(arguments)
    built = build_binidx(
        source.documents,
        opened.tokenizer,
        stem,
        vocab_size=opened.vocab_size,
        eos_token_id=opened.eos,
        max_tokens=arguments.max_tokens,
        processes=arguments.processes,
        special_tokens_as_text=arguments.special_tokens_as_text,
        on_progress=show,
    )
    console.line(_progress(built, 0.0, time.monotonic() - began))
    yield from describe(BinIdxReader(stem), (arguments.ctxlen,), opened.text_of)
    if left_out := str(source.left_out):
        yield left_out


def chat_lines(arguments: argparse.Namespace, open_renderer: OpenRenderer, console: Console) -> Iterator[str]:
    """Render a dataset of conversations into NAME.bin, .idx and .mask, and say what came of it, last what was left out.

    Raises ValueError as build_lines, for options that conversations do not have, and for faulty conversations.
    """
    from radlads.data.binidx import BinIdxReader
    from radlads.data.build_chat import build_chat, describe_mask
    from radlads.data.datasets_source import open_conversations

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _check(arguments)
    _check_chat(arguments)
    renderer = open_renderer(arguments.tokenizer)
    column = "messages" if arguments.column_name == "text" else arguments.column_name
    source = open_conversations(
        arguments.dataset,
        column=column,
        split=arguments.split,
        subset=arguments.subset,
        skips_faulty=arguments.skip_faulty,
    )
    began = time.monotonic()

    def show(so_far: "BuiltChat") -> None:
        done = so_far.num_documents / source.num_rows if source.num_rows else 0.0
        console.progress(_progress(so_far, done, time.monotonic() - began))

    stem = corpus_stem(arguments)
    built = build_chat(source.conversations, renderer, stem, max_tokens=arguments.max_tokens, on_progress=show)
    console.line(_progress(built, 0.0, time.monotonic() - began))
    yield from describe_mask(BinIdxReader(stem))
    if left_out := str(source.left_out):
        yield left_out


def _check_chat(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that are of texts alone."""
    given = {
        "--text_unit": arguments.text_unit != "document",
        "--processes": arguments.processes != 1,
        "--special_tokens_as_text": arguments.special_tokens_as_text,
        "--strict": arguments.strict,
    }
    if options := [option for option, is_given in given.items() if is_given]:
        raise ValueError(f"{options[0]} is for texts, not for conversations: leave it or --chat out")


def check_lines(arguments: argparse.Namespace, open_tokenizer: OpenTokenizer) -> Iterator[str]:
    """Read a built corpus as a whole. Raises ValueError for one that its tokenizer cannot have made."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.build_chat import describe_mask
    from radlads.data.corpus_checksums import check_checksums
    from radlads.data.inspect_corpus import describe, documents_ending_in
    from radlads.data.loader import check_vocabulary
    from radlads.data.mask import has_mask

    opened = open_tokenizer(arguments.tokenizer)
    stem = corpus_stem(arguments)
    reader = BinIdxReader(stem)
    check_checksums(reader.path_stem)
    check_vocabulary(reader, opened.vocab_size, f"{stem}.bin")
    yield from describe(reader, (arguments.ctxlen,), opened.text_of)
    if has_mask(reader):  # conversations end as their template has it
        yield from describe_mask(reader)
        return
    ended = documents_ending_in(reader, opened.eos)
    if ended < reader.num_documents:
        raise ValueError(
            f"{stem}.bin: {reader.num_documents - ended:,} of {reader.num_documents:,} documents do not end in the "
            f"tokenizer's EOS, {opened.eos}: run fixeos if they end in 0, else build it again"
        )


def fixeos_lines(arguments: argparse.Namespace, open_tokenizer: OpenTokenizer) -> Iterator[str]:
    """Replace the token 0 at the end of documents by the tokenizer's EOS."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.inspect_corpus import replace_trailing

    eos = open_tokenizer(arguments.tokenizer).eos
    stem = corpus_stem(arguments)
    reader = BinIdxReader(stem)
    changed = replace_trailing(reader, old=0, new=eos)
    yield f"{stem}.bin: {changed:,} of {reader.num_documents:,} documents ended in 0 and now end in {eos}"


def corpus_stem(arguments: argparse.Namespace) -> Path:
    """--out, or the dataset's name less its suffixes, in the working folder."""
    return arguments.out or Path(Path(arguments.dataset).expanduser().resolve().name.split(".")[0])


def _check(arguments: argparse.Namespace) -> None:
    limits = {"--ctxlen": (arguments.ctxlen, 1), "--processes": (arguments.processes, 1)}
    for option, (value, least) in (limits | {"--max_tokens": (arguments.max_tokens, 2)}).items():
        if value is not None and value < least:
            raise ValueError(f"{option} must be {least} or more, not {value}")


def _progress(so_far: "BuiltCorpus | BuiltChat", done: float, seconds: float) -> str:
    """`done`: the share of the work that lies behind, 0 if it is not known."""
    text = f"{so_far.num_documents:,} documents ({so_far.num_documents / seconds:,.0f}/s), "
    text += f"{so_far.num_tokens:,} tokens ({so_far.num_tokens / seconds:,.0f}/s)"
    left_s = seconds / done - seconds if 0 < done <= 1 else None
    return text if left_s is None else f"{text}, {left_s // 60:.0f} min {left_s % 60:.0f} s left"
