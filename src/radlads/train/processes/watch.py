"""A thread that watches the other processes of a run, because a process that waits for a dead one hears nothing."""

import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

_log = logging.getLogger(__name__)

BEAT_S, DEAD_AFTER_S, LEFT_AFTER_S, WORD_AFTER_S = 1.0, 30.0, 5.0, 15.0
"""How often a process says that it lives, after how long a silent one is taken for dead, how long the others have to
end by themselves once one has left with an error, and how long one with an error waits for the first to have it too."""
LOST = 2
"""Exit code of a process that ends because another one is gone."""
_AGAIN = "start the same command again to go on from the last checkpoint"


def how_it_ended(child: subprocess.Popen[bytes]) -> str:
    """A phrase for how a process that is no more has ended."""
    code = child.returncode
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Watch(threading.Thread):
    """Says every BEAT_S that this process lives, and ends it if another does not any more.

    A process that waits for one that is gone waits in C, for minutes, and no exception reaches it: hence a thread, and
    an exit without clean-up. Checkpoints are whole at any time, so nothing is lost but the steps since the last.
    """

    def __init__(self, store: dist.TCPStore, rank: int, size: int, children: list[subprocess.Popen[bytes]]):
        super().__init__(daemon=True, name="watch over the other processes")
        self._store, self._rank, self._size, self._children = store, rank, size, children
        self._seen = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._leaving = threading.Event()
        self.lost: str | None = None

    def run(self) -> None:
        beat = 0
        while not self._leaving.wait(BEAT_S):
            beat += 1
            self.lost = self.lost or self._look(beat)
            if self.lost is not None and not self._leaving.wait(LEFT_AFTER_S):
                self._give_up(self.lost)

    def _look(self, beat: int) -> str | None:
        """Say that this process lives; which other one is gone, if one is."""
        for child in self._children:
            if child.poll() is not None and child.returncode < 0:
                return f"a process of this run (pid {child.pid}) {how_it_ended(child)}: {_AGAIN}"
        try:
            self._store.set(f"alive/{self._rank}", str(beat))
            for other, (before, since) in self._seen.items():
                if self._store.check([f"left/{other}"]) and self._store.get(f"left/{other}"):
                    return f"process {other} of {self._size} has ended with an error of its own: {_AGAIN}"
                now = self._store.get(f"alive/{other}") if self._store.check([f"alive/{other}"]) else b""
                if now != before:
                    self._seen[other] = (now, time.monotonic())
                elif time.monotonic() - since > DEAD_AFTER_S:
                    return f"process {other} of {self._size} has not been heard of for {DEAD_AFTER_S:.0f} s: {_AGAIN}"
        except RuntimeError:  # torch's errors of a store derive from it
            return f"process 0 of {self._size} is gone: {_AGAIN}"
        return None

    def _give_up(self, why: str) -> NoReturn:
        if self.tells(why):
            _log.error("radlads: %s", why)  # to stderr, as nobody catches what a thread raises
        for child in self._children:
            child.kill()
        os._exit(LOST)

    def tells(self, why: str) -> bool:
        """Whether it is this process that has to say why the run ends: the first, unless it is what is gone."""
        return self._rank == 0 or why.startswith("process 0 ")

    def leave(self, why: str) -> None:
        """Tell the others that this process ends, and why ('': it is done)."""
        self._leaving.set()
        with suppress(RuntimeError):  # there may be no store any more
            self._store.set(f"left/{self._rank}", why)

    def wait_for_word_of(self, rank: int) -> str | None:
        """Why a process has left, if it does so soon."""
        try:
            self._store.wait([f"left/{rank}"], timedelta(seconds=WORD_AFTER_S))
            return self._store.get(f"left/{rank}").decode()
        except RuntimeError:
            return None

    def wait_for_loss(self) -> str | None:
        """Which process is gone, if one is found to be soon."""
        until = time.monotonic() + DEAD_AFTER_S + 2 * BEAT_S
        while self.lost is None and time.monotonic() < until and self.is_alive():
            time.sleep(BEAT_S / 4)
        return self.lost

    def wait_for_the_others(self) -> None:
        """Keep the store until all have left, if they do so soon."""
        with suppress(RuntimeError):
            self._store.wait([f"left/{other}" for other in self._seen], timedelta(seconds=LEFT_AFTER_S))

    def stop(self) -> None:
        """End the thread."""
        self._leaving.set()
        self.join()
