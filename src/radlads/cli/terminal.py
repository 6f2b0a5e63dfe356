"""What the user sees: progress, results on stdout, notices on stderr."""

import sys
from collections.abc import Iterable


class Terminal:
    """Progress on one line that is rewritten where stdout is a terminal, and as a line every ten seconds elsewhere."""

    QUIET_S = 10.0

    def __init__(self) -> None:
        self._in_place, self._open, self._last = sys.stdout.isatty(), False, 0.0

    def line(self, text: str) -> None:
        self._close()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        import time

        if self._in_place:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self._open = True
        elif time.monotonic() - self._last >= self.QUIET_S:
            self._last = time.monotonic()
            print(text, flush=True)

    def _close(self) -> None:
        if self._open:
            print("\r\x1b[2K", end="")
            self._open = False


def print_lines(lines: Iterable[str]) -> int:
    """Print each line as soon as it is there; 0, the exit code of a command that is done."""
    for line in lines:
        print(line)
    return 0


def notice(text: str) -> None:
    """Say something beside the results, on stderr."""
    print(f"radlads: {text}", file=sys.stderr, flush=True)
