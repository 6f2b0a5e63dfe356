"""Signals that ask a run to end: it finishes its step, writes a checkpoint and exits with 128 + the signal's number."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a scheduler, a service manager or Ctrl-C sends; SLURM's --signal=USR1@300 too."""


class Stopped(SystemExit):
    """A run ended because a signal asked for it; `code`, 128 + its number, is the process's exit code."""


class StopRequests:
    """Remembers the first of SIGNALS that arrives while its block lasts; a Ctrl-C after it raises KeyboardInterrupt.

    received: the signal that reached this process. agreed: one that reached some process of the run, once all know it;
    only then may the run end, or some would wait for others that are gone. A process that is `alone` agrees at once.
    Outside the main thread, where Python takes no signals, nothing is ever asked for.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # None is a handler that Python did not install, and cannot put back
            found = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self._earlier = {signum: handler for signum, handler in found.items() if handler is not None}
        for signum in self._earlier:
            signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(signum)
        if self._alone:
            self.agreed = self.received

    def stopped(self) -> Stopped:
        """What to raise once the run may end."""
        assert self.agreed is not None
        return Stopped(128 + self.agreed)

    def flags(self) -> list[float]:
        """What this process has received: 1 for it among SIGNALS, else 0."""
        return [float(self.received == signum) for signum in SIGNALS]

    def agree(self, sums: Sequence[float]) -> None:
        """Take note of the flags of all processes, added up."""
        found = [signum for signum, total in zip(SIGNALS, sums, strict=True) if total]
        self.agreed = self.agreed or next(iter(found), None)
