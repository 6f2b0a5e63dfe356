"""How the server ends: at a signal it takes no more requests, and ends once those it has are answered.

Needs uvicorn.
"""

import time
from types import FrameType

import uvicorn

from radlads.inference.openai_api import Desk


class GracefulServer(uvicorn.Server):
    """After SIGTERM or Ctrl-C, requests that came have `grace_s` seconds to be answered; new ones get 503.

    A second signal ends the server at once. The process is not ended by the signal: its exit code is 0.
    """

    def __init__(self, config: uvicorn.Config, desk: Desk, *, grace_s: float):
        super().__init__(config)
        self._desk, self._grace_s = desk, grace_s
        self._ends_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signals that uvicorn handles."""
        if self._desk.is_ending:
            self.should_exit = True
            return
        self._desk.is_ending = True
        self._ends_s = time.monotonic() + self._grace_s

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to end."""
        if self._ends_s is not None and (self._desk.is_idle or time.monotonic() >= self._ends_s):
            self.should_exit = True
        return await super().on_tick(counter)
