"""Prompts from the command line and from files, before a model sees them: what is no text is refused by a sentence.

Owns which tokens a raw text becomes, too: generate, serve, eval and longcontext all read it as transformers has it.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What an answer adds to its prompt's record
ANSWER_KEYS = ("text", "num_tokens", "finish_reason")


def checked_text(text: str, what: str) -> str:
    """A text of the command line or of a record. Raises ValueError that says `what` is no UTF-8 text, if it is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: convert it first") from error
    return text


def read_prompt(path: Path) -> str:
    """A file's whole text as one prompt; `-` is stdin. Raises ValueError if it is no UTF-8 text."""
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    return decoded_file(content, path)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """A file's prompts, as records with "prompt": each line of a text, or each object of a .jsonl file.

    Raises ValueError that names the line for an empty prompt or one that is no text, and for a file without prompts.
    """
    lines = decoded_file(path.read_bytes(), path).split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty: give one prompt on each line")
    record = _json_record if path.suffix == ".jsonl" else _text_record
    return [record(line.removesuffix("\r"), f"line {number} of {path}") for number, line in enumerate(lines, start=1)]


def prompt_ids(tokenizer: "Tokenizer", text: str, *, continues: bool = False) -> list[int]:
    """The tokens of a raw text, those of transformers' tokenizer: some, Llama 3's, put a BOS first. None of no text.

    continues: the text goes on from one that was read, so nothing is put first. A chat's text is no raw one: its
    template writes what stands first.
    """
    if not text:
        return []
    return tokenizer.encode(text, add_special_tokens=not continues).ids


def first_ids(tokenizer: "Tokenizer") -> list[int]:
    """What the tokenizer puts before a raw text, for prompts that are put together from tokens."""
    encoding = tokenizer.encode("a")
    num_first = len(list(takewhile(bool, encoding.special_tokens_mask)))
    return encoding.ids[:num_first]


def batches(lengths: Sequence[int], rows: int) -> Iterator[range]:
    """Divide prompts of these lengths, in order, into batches of at most `rows` in which at most half is padding."""
    start, longest, total = 0, 0, 0
    for index, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        count = index + 1 - start
        if index > start and (count > rows or count * longest > 2 * total):
            yield range(start, index)
            start, longest, total = index, length, length
    if lengths:
        yield range(start, len(lengths))


def _text_record(line: str, where: str) -> dict[str, Any]:
    if not line:
        raise ValueError(f"{where} is empty: give a prompt on each line, or take it out")
    return {"prompt": line}


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{where} is no JSON: give an object such as {{"prompt": "..."}} on each line') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where} has no text as "prompt": give an object such as {{"prompt": "..."}}')
    if not record["prompt"]:
        raise ValueError(f"{where} has an empty prompt: fill it, or take it out")
    if taken := [key for key in ANSWER_KEYS if key in record]:
        raise ValueError(f'{where} has a "{taken[0]}" of its own, where the answer is written: call it something else')
    checked_text(record["prompt"], f'the "prompt" of {where}')
    return record


def decoded_file(content: bytes, path: Path) -> str:
    """A file's text. Raises ValueError if it is no UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
