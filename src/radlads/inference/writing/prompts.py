"""What conversations begin with: lines of a text, objects of a .jsonl file, or the prompts that radlads brings."""

import json
from pathlib import Path
from typing import Any

from radlads.data.conversations import Conversation, fault_of
from radlads.inference.prompts import checked_text, decoded_file
from radlads.inference.writing.own_prompts import own_prompts


def read_beginnings(path: Path | None, *, system: str | None = None) -> list[Conversation]:
    """Conversations that wait for a reply: each line of a text is what a user says; an object of a .jsonl file has
    "prompt", or "messages" of several turns, and maybe "tools". None: radlads' own prompts.

    system: a system message for those that have none. Raises ValueError that names the line for what is none of these.
    """
    if path is None:
        found = [Conversation([{"role": "user", "content": text}]) for text in own_prompts()]
    else:
        lines = decoded_file(path.read_bytes(), path).splitlines()
        read = _of_object if path.suffix == ".jsonl" else _of_text
        found = [read(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]
    if not found:
        raise ValueError(f"{path} is empty: give one prompt on each line")
    return [_with_system(each, system) for each in found]


def _of_text(line: str, where: str) -> Conversation:
    if not line.strip():
        raise ValueError(f"{where} is empty: give a prompt on each line, or take it out")
    return Conversation([{"role": "user", "content": line}])


def _of_object(line: str, where: str) -> Conversation:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{where} is no JSON: give an object such as {{"prompt": "..."}} on each line') from error
    if not isinstance(content, dict) or not ({"prompt", "messages"} & content.keys()):
        raise ValueError(f'{where} has neither "prompt" nor "messages": give an object such as {{"prompt": "..."}}')
    if "messages" not in content:
        prompt = content["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{where} has no text as "prompt": fill it, or take it out')
        checked_text(prompt, f'the "prompt" of {where}')
        return Conversation([{"role": "user", "content": prompt}], _tools(content))
    messages = content["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError(f'{where} has no list of messages as "messages": mend it, or take it out')
    if (fault := fault_of(messages)) is not None:
        raise ValueError(f"{where} is no conversation, as {fault}: mend it, or take it out")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where} does not wait for a reply: end its messages with the user's")
    return Conversation(messages, _tools(content))


def _tools(content: dict[str, Any]) -> list[Any] | None:
    return content.get("tools") or None


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None or conversation.messages[0]["role"] == "system":
        return conversation
    return Conversation([{"role": "system", "content": system}, *conversation.messages], conversation.tools)
