"""Passkey and needle: a number is told once within a long text, and asked for at its end.

Owns the prompts, the number of right answers and nothing else. Prompts are put together from tokens: each has exactly
the length asked for, begins with the BOS if its tokenizer puts one before a text, and its answer is the same tokens
where it is told and where it is asked for.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from radlads.checkpoint.tokenizer_files import num_ids
from radlads.inference.decoder import Decoder
from radlads.inference.prompts import first_ids
from radlads.inference.sampling import Sampling
from radlads.model.modeling import RadladsForCausalLM

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_CITIES = ("Oslo", "Lima", "Cairo", "Tokyo", "Paris", "Delhi", "Quito", "Seoul", "Accra", "Turin", "Osaka", "Porto")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A fact, its question, and digits of the answer. {city} is drawn for each prompt. uses_text: hides the fact in a
    text that is given, not in FILLER."""

    introduction: str
    before: str
    after: str
    question: str
    digits: int
    uses_text: bool


TASKS = {
    "passkey": Task(
        introduction="There is an important fact hidden in a lot of irrelevant text. Find it and memorize it.\n",
        before="\nThe pass key is",
        after=". Remember it.\n",
        question="\nWhat is the pass key? The pass key is",
        digits=5,
        uses_text=False,
    ),
    "needle": Task(
        introduction="",
        before="\nThe magic number of {city} is",
        after=".\n",
        question="\nWhat is the magic number of {city}? The magic number of {city} is",
        digits=7,
        uses_text=True,
    ),
}


@dataclass(frozen=True)
class Prompt:
    """Tokens to read, and the tokens of the right answer."""

    tokens: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Cell:
    """Right answers at one length of prompt, with the fact at one depth: 0 at the start, 1 just before the question."""

    length_tokens: int
    depth: float
    num_right: int
    num_samples: int


class PromptWriter:
    """Writes one task's prompts. text: the tokens in which tasks that use a text hide their fact."""

    def __init__(self, task: str, tokenizer: Tokenizer, text: NDArray[np.integer]):
        self.name, self.task, self._tokenizer, self._first = task, TASKS[task], tokenizer, first_ids(tokenizer)
        self._haystack = text if self.task.uses_text else np.array(self._ids(FILLER))

    def write(self, length_tokens: int, depth: float, *, seed: int) -> Prompt:
        """The prompt of `length_tokens` that task, length, depth and seed alone decide.

        Raises ValueError if the length is too short for the fact and its question.
        """
        draw = random.Random(f"{self.name} {length_tokens} {depth} {seed}")
        city = draw.choice(_CITIES)
        answer = self._ids(f" {draw.randrange(10 ** (self.task.digits - 1), 10**self.task.digits)}")
        introduction = [*self._first, *self._ids(self.task.introduction)]
        fact = [*self._ids(self.task.before.format(city=city)), *answer, *self._ids(self.task.after)]
        question = self._ids(self.task.question.format(city=city))
        hay_tokens = length_tokens - len(introduction) - len(fact) - len(question)
        if hay_tokens < 0:
            raise ValueError(
                f"{length_tokens} tokens are too few for a {self.name} prompt, which takes "
                f"{length_tokens - hay_tokens} without any text around it: use longer --lengths"
            )
        hay = self._hay(hay_tokens, draw)
        cut = round(depth * hay_tokens)
        return Prompt([*introduction, *hay[:cut], *fact, *hay[cut:], *question], answer)

    def _hay(self, num_tokens: int, draw: random.Random) -> list[int]:
        """Tokens of the text from a drawn place on, from its start again where it ends."""
        first = draw.randrange(len(self._haystack)) if self.task.uses_text else 0
        hay: list[int] = self._haystack.take(range(first, first + num_tokens), mode="wrap").tolist()
        return hay

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class Recall:
    """Asks a model, `batch_rows` prompts of equal length at a time, and counts the answers that are right as a whole.

    The decoder takes the likeliest token each time and no id that is no token.
    """

    def __init__(self, model: RadladsForCausalLM, tokenizer: Tokenizer, *, batch_rows: int):
        self._model, self._batch_rows = model, batch_rows
        self._sampling = Sampling(temperature=0, num_ids=num_ids(tokenizer))
        self._decoders: dict[int, Decoder] = {}

    def num_right(self, prompts: Sequence[Prompt]) -> int:
        """How many prompts the model continues with exactly the answer's tokens."""
        batches = (prompts[i : i + self._batch_rows] for i in range(0, len(prompts), self._batch_rows))
        return sum(self._num_right_of_batch(batch) for batch in batches)

    def _num_right_of_batch(self, prompts: Sequence[Prompt]) -> int:
        rows, num_tokens = len(prompts), max(len(prompt.answer) for prompt in prompts)
        if rows not in self._decoders:
            self._decoders[rows] = Decoder(self._model, rows, self._sampling)
        decoder = self._decoders[rows]
        decoder.prefill([prompt.tokens for prompt in prompts])
        said = list(zip(*decoder.generated(num_tokens), strict=True))
        pairs = zip(prompts, said, strict=True)
        return sum(list(tokens[: len(prompt.answer)]) == prompt.answer for prompt, tokens in pairs)


@torch.no_grad()
def retrieval_grid(
    recall: Recall,
    writer: PromptWriter,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_samples: int,
    seed: int,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Every length at every depth, `num_samples` prompts each; the prompts are the same for every model."""
    cells = []
    for length in lengths:
        for depth in depths:
            prompts = [writer.write(length, depth, seed=seed + sample) for sample in range(num_samples)]
            cells.append(Cell(length, depth, recall.num_right(prompts), num_samples))
            on_cell(cells[-1])
    return cells
