"""Who is answered when: a queue, the places of those being answered, and the order in which prompts are read.

Pure logic: knows neither models nor clients. A request waits, is admitted, read piece by piece, decoded and released.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


class TooLarge(ValueError):
    """A request whose state would not fit even if it were alone."""


@dataclass(frozen=True)
class Piece(Generic[Name]):
    """The prompt's tokens from `start` to before `stop` are to be read now. is_last: none are left then."""

    name: Name
    start: int
    stop: int
    is_last: bool

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the prompt."""
        return self.start == 0 and self.is_last


@dataclass
class _Request:
    num_tokens: int
    num_bytes: int
    num_read: int = 0


class Scheduler(Generic[Name]):
    """First come, first admitted, while there are rows and bytes; prompts are read in turn.

    max_rows: requests that are read or decoded at the same time. max_bytes: of their states together. A request that
    waits for memory holds up those behind it, so that small ones cannot keep it waiting for ever.
    """

    def __init__(self, max_rows: int, max_bytes: int):
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self._waiting: dict[Name, _Request] = {}
        self._admitted: dict[Name, _Request] = {}
        self._turns: deque[Name] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are read or decoded."""
        return len(self._admitted)

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - sum(request.num_bytes for request in self._admitted.values())

    def names(self) -> list[Name]:
        """All that wait or run."""
        return [*self._admitted, *self._waiting]

    def check(self, num_bytes: int) -> None:
        """Raise TooLarge for a state that can never be admitted."""
        if num_bytes > self.max_bytes:
            raise TooLarge(
                f"the request needs {num_bytes / 1e9:.3g} GB of state, but the server has {self.max_bytes / 1e9:.3g} "
                "GB for all: shorten the prompt or the answer, or start it with more --state-memory"
            )

    def submit(self, name: Name, num_tokens: int, num_bytes: int) -> None:
        """Put a request at the end of the queue. num_tokens: of its prompt, at least 1. Raises TooLarge."""
        assert num_tokens > 0 and name not in self._waiting and name not in self._admitted
        self.check(num_bytes)
        self._waiting[name] = _Request(num_tokens, num_bytes)

    def admit(self) -> list[Name]:
        """Admit as many of those that have waited longest as there is room for; their names."""
        admitted = []
        while self._waiting and self.num_running < self.max_rows:
            name, request = next(iter(self._waiting.items()))
            if request.num_bytes > self.free_bytes:
                break
            self._admitted[name] = self._waiting.pop(name)
            self._turns.append(name)
            admitted.append(name)
        return admitted

    def pieces(self, budget: int) -> list[Piece[Name]]:
        """What to read before the next decoding step: at most `budget` tokens, of each prompt at most one piece.

        A prompt that is not read to its end waits until all others had their turn.
        """
        pieces: list[Piece[Name]] = []
        for _ in range(len(self._turns)):
            if budget == 0:
                break
            name = self._turns.popleft()
            request = self._admitted[name]
            start = request.num_read
            request.num_read += min(budget, request.num_tokens - start)
            budget -= request.num_read - start
            is_last = request.num_read == request.num_tokens
            if not is_last:
                self._turns.append(name)
            pieces.append(Piece(name, start, request.num_read, is_last))
        return pieces

    def release(self, name: Name) -> None:
        """Forget a request, wherever it is: it has ended, failed or been cancelled."""
        if self._waiting.pop(name, None) is None and self._admitted.pop(name, None) is not None:
            self._turns = deque(each for each in self._turns if each != name)
