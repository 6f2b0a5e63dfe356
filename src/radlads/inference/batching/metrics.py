"""What a server counts, in Prometheus' text format 0.0.4. Written by one thread, read by any."""

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# How far back the rate of tokens looks
RATE_S = 10.0
# How requests end. stop: by a stop token or text. length: at max_tokens. refused: before they were queued
OUTCOMES = ("stop", "length", "cancelled", "error", "refused")


class Metrics:
    """Counts since the start. Times are of time.perf_counter, in seconds."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self._first_tokens: Counter[float] = Counter()  # by the smallest bound that is not exceeded
        self._first_token_sum_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def note_token(self, asked_s: float | None) -> None:
        """One token of an answer. asked_s: when the request was queued, for the first one."""
        now = time.perf_counter()
        self.num_tokens += 1
        if asked_s is not None:
            seconds = now - asked_s
            self._first_tokens[next((bound for bound in FIRST_TOKEN_S if seconds <= bound), float("inf"))] += 1
            self._first_token_sum_s += seconds
        if not self._recent or now - self._recent[-1][0] > RATE_S / 100:
            self._recent.append((now, 0))
        self._recent[-1] = self._recent[-1][0], self._recent[-1][1] + 1
        while self._recent[0][0] < now - RATE_S:
            self._recent.popleft()

    def tokens_per_second(self) -> float:
        """Of all answers together, over the last RATE_S."""
        since = time.perf_counter() - RATE_S
        return sum(count for moment, count in list(self._recent) if moment >= since) / RATE_S

    def text(self, *, running: int, waiting: int) -> str:
        """All of it. running: requests being read or decoded; waiting: those queued."""
        lines = [
            *_metric("requests_total", "counter", "Requests by how they ended.", self._by_outcome()),
            *_metric("prompt_tokens_total", "counter", "Tokens of prompts read.", [("", self.num_prompt_tokens)]),
            *_metric("generated_tokens_total", "counter", "Tokens of answers.", [("", self.num_tokens)]),
            *_metric("requests_running", "gauge", "Requests being read or decoded.", [("", running)]),
            *_metric("requests_waiting", "gauge", "Requests in the queue.", [("", waiting)]),
            *_metric(
                "generated_tokens_per_second",
                "gauge",
                f"Tokens of answers per second over the last {RATE_S:.0f} seconds.",
                [("", self.tokens_per_second())],
            ),
            *_metric(
                "first_token_seconds",
                "histogram",
                "Seconds from a request's arrival in the queue to its first token.",
                self._histogram(),
            ),
        ]
        return "\n".join(lines) + "\n"

    def _by_outcome(self) -> list[tuple[str, float]]:
        return [(f'{{outcome="{outcome}"}}', self.requests[outcome]) for outcome in OUTCOMES]

    def _histogram(self) -> Iterator[tuple[str, float]]:
        counts, total = self._first_tokens.copy(), 0
        for bound in FIRST_TOKEN_S:
            total += counts[bound]
            yield f'_bucket{{le="{bound:g}"}}', total
        total += counts[float("inf")]
        yield '_bucket{le="+Inf"}', total
        yield "_sum", self._first_token_sum_s
        yield "_count", total


def _metric(name: str, kind: str, help_text: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP radlads_{name} {help_text}"
    yield f"# TYPE radlads_{name} {kind}"
    for suffix, value in samples:
        yield f"radlads_{name}{suffix} {value:.12g}"
