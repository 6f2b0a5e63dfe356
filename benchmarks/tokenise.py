"""Compare building a token corpus with tokenizers' own encode_batch, on the same text and as many processes.

    python benchmarks/tokenise.py [--text x.jsonl --tokenizer DIR --processes 2 --megabytes 8 --runs 3]

Without --text the running Python's own sources are read, as often as it takes. encode_batch gets the text as lists in
memory, and as many threads as there are processes; the corpus is built from a jsonl file by `datasets`, written and
read back. Starting the processes is left out: it is a matter of seconds, once. The bar is 0.8.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a dataset with a column text")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json (default: the bundled teacher)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text to encode")
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn; medians are compared")
    arguments = parser.parse_args()
    # Read by the tokenizers library when it first encodes
    os.environ["RAYON_NUM_THREADS"] = str(arguments.processes)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = load_texts(arguments.text, int(arguments.megabytes * 1e6))
    theirs, ours = [], []
    for _ in range(arguments.runs):
        theirs.append(encode_batch_rate(texts, arguments.tokenizer))
        ours.append(build_rate(texts, arguments.tokenizer, arguments.processes))
    print(f"{len(texts):,} documents, {arguments.processes} processes, median of {arguments.runs} runs")
    their_rate, our_rate = statistics.median(theirs), statistics.median(ours)
    print(f"encode_batch {their_rate:12,.0f} tokens/s\nbuild        {our_rate:12,.0f} tokens/s")
    print(f"ratio {our_rate / their_rate:.2f} (bar 0.8)")


def load_texts(dataset: str | None, num_characters: int) -> list[str]:
    from radlads.data.datasets_source import open_documents
    from radlads.data.python_text import iter_documents

    source = open_documents(dataset).documents if dataset else (text for _, text in iter_documents("train"))
    taken, texts = 0, []
    for text in itertools.cycle(source):
        if taken >= num_characters:
            return texts
        texts.append(text)
        taken += len(text)
    raise AssertionError("a cycle ends only if it is empty, which both sources refuse")


def load(folder: Path | None):
    from tokenizers import Tokenizer

    from radlads.recipes.stage_configs import BUNDLED_TEACHER

    return Tokenizer.from_file(str(Path(folder or BUNDLED_TEACHER) / "tokenizer.json"))


def encode_batch_rate(texts: list[str], folder: Path | None) -> float:
    """Tokens a second of encode_batch alone, 256 texts at a time, ids thrown away."""
    tokenizer = load(folder)
    began, num_tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 256):
        encodings = tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False)
        num_tokens += sum(len(encoding) for encoding in encodings)
    return num_tokens / (time.perf_counter() - began)


def build_rate(texts: list[str], folder: Path | None, processes: int) -> float:
    """Tokens a second of reading jsonl, encoding and writing, from the first finished batch to the end."""
    from radlads.data.build import BuiltCorpus, build_binidx
    from radlads.data.datasets_source import open_documents

    tokenizer = load(folder)
    marks: list[tuple[float, int]] = []

    def mark(so_far: BuiltCorpus) -> None:
        marks.append((time.perf_counter(), so_far.num_tokens))

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source, vocab_size = open_documents(str(path)), tokenizer.get_vocab_size()
        build_binidx(
            source.documents,
            tokenizer,
            Path(scratch) / "corpus",
            vocab_size=vocab_size,
            eos_token_id=vocab_size - 1,
            processes=processes,
            on_progress=mark,
        )
        ended = time.perf_counter()
    (began, before), (_, after) = marks[0], marks[-1]
    return (after - before) / (ended - began)


if __name__ == "__main__":
    main()
