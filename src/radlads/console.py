"""Where long work says how far it is. The command line has one that prints, tests one that keeps what it is told."""

from typing import Protocol


class Console(Protocol):
    """Where messages go: `line` for those that stay, `progress` for those the next one may replace."""

    def line(self, text: str) -> None: ...

    def progress(self, text: str) -> None: ...


class Silent:
    """A console that shows nothing: of the processes of a run, all but the first have it."""

    def line(self, text: str) -> None:
        """Nothing."""

    def progress(self, text: str) -> None:
        """Nothing."""
