"""Conversations as chat data sets hold them: messages with roles, and the tools that an assistant may call.

Owns what is a conversation, and the sentence that says why something is none. Leaves templates to whoever has them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radlads.data.text_cells import Cell

Message = dict[str, Any]

ASSISTANT = "assistant"
_ROLES = {"human": "user", "gpt": ASSISTANT, "developer": "system", "function": "tool"}
# What may follow a message of a role; "" is the beginning
_FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": (ASSISTANT,),
    ASSISTANT: ("user", "tool"),
    "tool": ("tool", ASSISTANT),
}


@dataclass(frozen=True)
class Conversation:
    """Messages, each with "role" and "content" and what else a template reads; tools: descriptions of functions."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass
class LeftOutChats:
    """Rows that gave no conversation so far: null ones, those without a reply, and faulty ones that may be left out.
    As text one line, "" if none."""

    nulls: int = 0
    without_reply: int = 0
    faulty: int = 0

    def __str__(self) -> str:
        counts = (
            (self.nulls, "null conversation"),
            (self.without_reply, "conversation without a reply"),
            (self.faulty, "faulty conversation"),
        )
        shown = [f"{count:,} {_plural(name, count)}" for count, name in counts if count]
        return f"left out: {', '.join(shown)}" if shown else ""


def conversations_of(
    name: str, cells: Iterable[Cell], column: str, left_out: LeftOutChats, *, skips_faulty: bool = False
) -> Iterator[Conversation]:
    """The conversations in a file's cells, with their tools beside them.

    Raises ValueError, naming file, row and message, at what is no conversation; or leaves it out, if skips_faulty.
    """
    for cell in cells:
        if cell.value is None:
            left_out.nulls += 1
            continue
        messages = _messages(cell.value)
        fault = "it is no list of messages" if messages is None else fault_of(messages)
        if fault is not None:
            if not skips_faulty:
                line = "" if cell.line is None else f" (line {cell.line})"
                raise ValueError(
                    f"{name}: row {cell.row} is no conversation in column {column!r}{line}, as {fault}: mend or remove "
                    "the row, or leave such rows out with --skip_faulty"
                )
            left_out.faulty += 1
            continue
        assert messages is not None
        if not any(message["role"] == ASSISTANT for message in messages):
            left_out.without_reply += 1
            continue
        yield Conversation(messages, _tools(cell.beside))


def fault_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Why messages are no conversation, as a phrase: a turn that nobody may have there, or one that is empty.

    A system message may come first; then user and assistant take turns, tools answering the assistant in between.
    """
    before = ""
    if not messages:
        return "it has no messages"
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in _FOLLOWS or not role:
            return f"message {number} has the role {role!r}, which is none of system, user, assistant and tool"
        if role not in _FOLLOWS[before]:
            after = f"after the {before}'s" if before else "at the beginning"
            return f"message {number} is the {role}'s {after}, where turns do not alternate"
        if not isinstance(content, str | list | None):
            return f"message {number} holds no text but the {type(content).__name__} {content!r:.40}"
        is_empty = not content or (isinstance(content, str) and not content.strip())
        if is_empty and role in ("user", ASSISTANT) and not message.get("tool_calls"):
            return f"message {number}, the {role}'s, is empty"
        before = role
    return None


def _messages(value: Any) -> list[Message] | None:
    """A cell's messages, in the usual words; a cell may also hold them as JSON. None if they are none."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, Sequence) or not all(isinstance(each, Mapping) for each in value):
        return None
    return [_usual(each) for each in value]


def _usual(message: Mapping[str, Any]) -> Message:
    """A message with "role" and "content" for "from" and "value", and without what Arrow adds where others have it."""
    found = _without_nulls(message)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in found and ours not in found:
            found[ours] = found.pop(theirs)
    role = found.get("role")
    found["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    found.setdefault("content", "")
    return found


def _tools(value: Any) -> list[Any] | None:
    parsed = _parsed(value) if isinstance(value, str) else value
    return _without_nulls(parsed) if isinstance(parsed, list) and parsed else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _plural(name: str, count: int) -> str:
    return name if count == 1 else name.replace("conversation", "conversations")
