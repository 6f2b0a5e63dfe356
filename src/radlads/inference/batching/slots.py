"""The texts being decoded: a state for each at a fixed place in memory, and the step that advances all of them.

Rows 0 to n - 1 are in use, so that a step of any size does not look further; the last row takes the place of one that
leaves. Shape letters: B rows, V vocabulary.
"""

from typing import Any, Protocol

import torch

from radlads.inference.decode_steps import RowStep, Step, build_row_step
from radlads.inference.prefill import prefill
from radlads.model.cache import RadladsCache
from radlads.model.configuration import state_bytes
from radlads.model.modeling import RadladsForCausalLM


class Slots(Protocol):
    """States of up to `rows` texts. reads_together: put takes texts that were read in one padded batch."""

    rows: int
    reads_together: bool

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """Have a row go on from the text `index` of a prefilled cache."""

    def move(self, source: int, target: int) -> None:
        """Have a row go on where another one is, which is given up."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next logits [n, V] of the first n rows, whose tokens [n] are read. Valid until the next step."""


class RecurrentSlots:
    """Of stacks without softmax layers: one step for all rows.

    On CUDA, graphs are recorded for a few numbers of rows, and a step takes the next larger one: what the rows beyond
    hold is computed with and looked at by nobody.
    """

    reads_together = True

    @torch.inference_mode()
    def __init__(self, model: RadladsForCausalLM, rows: int, *, fused: bool = True, graphed: bool = True):
        device, self.rows = model.device, rows
        _, cache = prefill(model, torch.zeros(1, 1, dtype=torch.int64, device=device))
        self._wide = build_row_step(model, rows, cache, fused=fused)
        self._steps: dict[int, Step] = {}
        self._is_graphed = graphed and device.type == "cuda" and self._wide.is_graphable
        if self._is_graphed:
            tokens, pool = torch.zeros(rows, dtype=torch.int64, device=device), torch.cuda.graph_pool_handle()
            for size in reversed(graph_sizes(rows)):  # the largest takes memory that the others then share
                self._steps[size] = GraphedStep(self._wide.narrowed(size), tokens[:size], pool)
            self._tokens = tokens

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """See Slots. The cache stays as it is."""
        self._wide.put(row, cache, index)

    def move(self, source: int, target: int) -> None:
        """See Slots."""
        self._wide.move(source, target)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See Slots."""
        num = len(tokens)
        if not self._is_graphed:
            if num not in self._steps:
                self._steps[num] = self._wide.narrowed(num)
            return self._steps[num](tokens)
        self._tokens[:num].copy_(tokens)
        size = min(size for size in self._steps if size >= num)
        return self._steps[size](self._tokens[:size])[:num]


class CachedSlots:
    """Of stacks with softmax layers, whose caches grow: each row has its own, and rows are advanced in turn."""

    reads_together = False

    def __init__(self, model: RadladsForCausalLM, rows: int):
        self.model, self.rows = model, rows
        self._caches: list[RadladsCache | None] = [None] * rows

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """See Slots. The cache, of one text alone, is taken over and grows."""
        assert index == 0 and cache.next_positions is not None and len(cache.next_positions) == 1
        self._caches[row] = cache

    def move(self, source: int, target: int) -> None:
        """See Slots."""
        self._caches[target], self._caches[source] = self._caches[source], None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See Slots."""
        rows = zip(tokens[:, None, None], self._caches, strict=False)  # caches beyond the tokens are not in use
        return torch.cat([self._logits(token, cache) for token, cache in rows])

    def _logits(self, token: torch.Tensor, cache: RadladsCache | None) -> torch.Tensor:
        assert cache is not None
        return self.model(token, past_key_values=cache, use_cache=True).logits[:, -1]


class GraphedStep:
    """A step recorded as a CUDA graph. Reads its tokens at the place where they lay; spoils the states once."""

    is_graphable = True

    def __init__(self, step: RowStep, tokens: torch.Tensor, pool: Any):
        self._step = step
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # what compiles or allocates at its first call must not be recorded
                step(tokens)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # weights cast earlier would be let go, and replayed all the same
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = step(tokens)
        torch.clear_autocast_cache()

    def load(self, cache: RadladsCache) -> None:
        self._step.load(cache)

    def follow_weights(self) -> None:
        self._step.follow_weights()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self._graph.replay()
        return self._logits


def graph_sizes(rows: int) -> list[int]:
    """The numbers of rows that graphs are recorded for: powers of two below `rows`, and `rows`."""
    return [*(2**n for n in range(rows.bit_length()) if 2**n < rows), rows]


def grows(model: RadladsForCausalLM) -> bool:
    """Whether a text's state grows with it: there are softmax layers."""
    return len(model.config.recurrent_layers) < model.config.num_hidden_layers


def build_slots(model: RadladsForCausalLM, rows: int) -> Slots:
    """Room for `rows` texts of this model; more than 64 rows do not run in fused kernels."""
    return CachedSlots(model, rows) if grows(model) else RecurrentSlots(model, rows)


def bytes_of_text(model: RadladsForCausalLM, num_tokens: int) -> int:
    """Bytes that a text of this length takes while it is answered: its state, and of recurrent layers the one that is
    filled while its prompt is read."""
    return state_bytes(model.config, num_tokens, bytes_per_value=model.dtype.itemsize) * (1 if grows(model) else 2)
