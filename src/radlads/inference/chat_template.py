"""A model folder's chat template: messages in, tokens out, what ends a reply, and which tokens are one's."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from radlads.checkpoint.tokenizer_files import GENERATION_FILE, num_ids, read_tokenizer
from radlads.convert.hf_source import end_of_text_id, open_tokenizer
from radlads.data.build_chat import Rendered
from radlads.data.conversations import ASSISTANT, Message
from radlads.files import read_json

# What a template's own code may raise, whoever wrote it
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_PROBE, _ANSWER = "radlads asks", "radlads answers"


class ChatTemplate:
    """The chat template in a folder, with its tokenizer.

    Raises ValueError for a folder without one, and for one that cannot be rendered or leaves out what the user says.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.folder = folder
        self.tokenizer = open_tokenizer(folder, vocab_size)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{folder} has no chat template: copy chat_template.jinja from an instruct model with this tokenizer, "
                "or do without one: radlads generate, radlads eval"
            )
        if _PROBE not in self.text([{"role": "user", "content": _PROBE}]):
            raise ValueError(f"the chat template of {folder} leaves out what the user says: copy it anew")

    @property
    def vocab_size(self) -> int:
        """Beyond every id of the tokenizer."""
        return num_ids(self.tokenizer._tokenizer)

    def text(self, messages: Sequence[Message], *, asks: bool = True, tools: list[Any] | None = None) -> str:
        """The messages as one text; asks: with the beginning of the reply. Raises ValueError if the template fails."""
        with template_errors_named(f"of {self.folder}"):
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=asks
                )
            )

    def token_ids(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The messages and the beginning of the reply as tokens."""
        return self._encode(self.text(messages, tools=tools))

    def rendered(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
        """A conversation up to the end of its last reply, and which tokens its assistant wrote: what follows the
        beginning of a reply, and the token that ends it.

        Raises ValueError if the template shows a reply in another way than it asks for it.
        """
        whole = self.text(messages, asks=False, tools=tools)
        encoding = self.tokenizer._tokenizer.encode(whole, add_special_tokens=False)
        mask, ends = [False] * len(encoding.ids), frozenset(self._turn_end())
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked = self.text(messages[:number], tools=tools)
            shown = "" if ends else self.text(messages[: number + 1], asks=False, tools=tools)
            if not (whole.startswith(asked) and whole.startswith(shown)):
                raise ValueError(
                    f"the chat template of {self.folder} shows message {number + 1} in another way than it asks for "
                    "it, so that the reply's tokens cannot be told: leave such conversations out, or cut them before it"
                )
            for place, (begins, stops) in enumerate(encoding.offsets):
                if stops <= len(asked) or (shown and begins >= len(shown)):
                    continue
                mask[place] = True
                if encoding.ids[place] in ends:
                    break
        num = max((place + 1 for place, is_own in enumerate(mask) if is_own), default=0)
        return Rendered(list(encoding.ids[:num]), mask[:num])

    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply: the folder's, and the special token that the template itself puts after a reply."""
        return stop_ids(self.folder) | frozenset(self._turn_end())

    def turn_end(self) -> int:
        """The token that ends a reply: the template's own, if it is a special one, else the tokenizer's end of text."""
        return next(iter(self._turn_end()), end_of_text_id(self.folder, self.tokenizer._tokenizer))

    def missing_tokens(self) -> list[str]:
        """What looks like a special token in the template's output, but is none of the tokenizer's."""
        text = self.text([{"role": "user", "content": _PROBE}])
        marks = dict.fromkeys(re.findall(r"<\|[^|<>\s]+\|>", text))
        return [mark for mark in marks if mark not in self.tokenizer.get_vocab()]

    def _turn_end(self) -> list[int]:
        """The token after a reply, if it is a special one."""
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
        _, answered, rest = self.text(messages, asks=False).rpartition(_ANSWER)
        ids = self._encode(rest)[:1] if answered else []
        return [number for number in ids if number in self.tokenizer.added_tokens_decoder]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextlib.contextmanager
def template_errors_named(whose: str) -> Iterator[None]:
    """Have whatever a template's code raises come out as a ValueError that says whose template it is."""
    try:
        yield
    except _TEMPLATE_ERRORS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"the chat template {whose} fails: {reason}") from error


def stop_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text: the tokenizer's end of text and those of generation_config.json."""
    path = folder / GENERATION_FILE
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = ids if isinstance(ids, list) else [ids]
    return frozenset({end_of_text_id(folder, read_tokenizer(folder)), *(x for x in ids if isinstance(x, int))})
