"""What benchmarks/talks.py asks: instructions that a program can check. None is trained on (own_prompts.py)."""

import json
import random
import re
from collections.abc import Callable
from typing import NamedTuple

_SUBJECTS = (
    *(
        "castles",
        "robots",
        "rainforests",
        "pizza",
        "dolphins",
        "the Sahara",
        "guitars",
        "snow",
        "telescopes",
        "tomatoes",
    ),
    *("airports", "pirates", "mathematics", "cats", "the Eiffel Tower", "chocolate", "rivers", "comets", "gardening"),
    *("elephants", "museums", "cycling", "the human brain", "oranges", "islands"),
)
_SEED = 7


class Asked(NamedTuple):
    """A prompt, what kind it is, and what tells whether a reply follows it."""

    prompt: str
    kind: str
    is_followed: Callable[[str], bool]


def asked(number: int) -> list[Asked]:
    """The first `number` prompts, whose kinds take turns; the same every time."""
    draw = random.Random(_SEED)
    found = []
    for place in range(number):
        subject = _SUBJECTS[(place // len(_KINDS)) % len(_SUBJECTS)]
        found.append(_KINDS[place % len(_KINDS)](subject, draw))
    return found


def _capitals(subject: str, draw: random.Random) -> Asked:
    prompt = f"Write one sentence about {subject}. Use capital letters only."
    return Asked(prompt, "capitals", lambda reply: bool(re.search(r"[A-Z]{3}", reply)) and reply == reply.upper())


def _items(subject: str, draw: random.Random) -> Asked:
    number = draw.choice((3, 4, 5))
    prompt = f"List exactly {number} things that have to do with {subject}, one on each line, without anything else."

    def is_followed(reply: str) -> bool:
        return len([line for line in reply.splitlines() if line.strip()]) == number

    return Asked(prompt, "items", is_followed)


def _json(subject: str, draw: random.Random) -> Asked:
    keys = draw.sample(["name", "colour", "size", "place", "use"], 2)
    prompt = f'Describe {subject} as a JSON object with the keys "{keys[0]}" and "{keys[1]}". Answer with JSON only.'

    def is_followed(reply: str) -> bool:
        text = re.sub(r"^```(?:json)?|```$", "", reply.strip()).strip()
        try:
            content = json.loads(text)
        except ValueError:
            return False
        return isinstance(content, dict) and content.keys() == set(keys)

    return Asked(prompt, "json", is_followed)


def _forbidden(subject: str, draw: random.Random) -> Asked:
    word = draw.choice(("very", "the", "and", "many"))
    prompt = f"Write two sentences about {subject}. Do not use the word '{word}'."
    return Asked(prompt, "forbidden", lambda reply: bool(reply) and not re.search(rf"\b{word}\b", reply, re.IGNORECASE))


def _sum(subject: str, draw: random.Random) -> Asked:
    a, b = draw.randint(2, 49), draw.randint(2, 49)
    prompt = f"What is {a} + {b}? Answer with the number only."
    return Asked(prompt, "sum", lambda reply: re.findall(r"\d+", reply)[-1:] == [str(a + b)])


def _copied(subject: str, draw: random.Random) -> Asked:
    words = " ".join(draw.sample(["apple", "river", "stone", "cloud", "tiger", "lamp", "ship", "grass"], 5))
    prompt = f"Repeat these words exactly as they are: {words}"
    return Asked(prompt, "copied", lambda reply: words in reply.lower())


def _begun(subject: str, draw: random.Random) -> Asked:
    word = draw.choice(("Yes", "Today", "Perhaps"))
    prompt = f"Tell me something about {subject}. Begin your answer with the word '{word}'."
    return Asked(prompt, "begun", lambda reply: reply.lstrip("\"' ").lower().startswith(word.lower()))


def _sorted(subject: str, draw: random.Random) -> Asked:
    numbers = draw.sample(range(1, 60), 4)
    prompt = f"Sort these numbers from small to large: {', '.join(map(str, numbers))}. Answer with the numbers only."

    def is_followed(reply: str) -> bool:
        return [int(each) for each in re.findall(r"\d+", reply)][-4:] == sorted(numbers)

    return Asked(prompt, "sorted", is_followed)


_KINDS = (_capitals, _items, _json, _forbidden, _sum, _copied, _begun, _sorted)
