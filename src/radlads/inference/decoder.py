"""Decoding a batch of prompts in lockstep: prefill, then one token for every row per step, sampled on the device.

Owns the CUDA graph around a step, and the tokens' way back. Leaves the step to decode_steps.py and sampling's rules to
sampling.py. Shape letters: B rows, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from radlads.inference.decode_steps import build_step
from radlads.inference.finite import NotFinite, are_finite
from radlads.inference.prefill import PREFILL_TOKENS, left_padded, prefill
from radlads.inference.sampling import Sampling, choose, row_generators
from radlads.model.cache import RadladsCache
from radlads.model.modeling import RadladsForCausalLM

# Steps the device may be ahead of the reader; more of them only delay the text and waste work after a stop
STEPS_AHEAD = 2
DRAWS = 1024
# Instead of a token: the row has ended; its logits were not finite
ENDED, NOT_FINITE = -1, -2


class Decoder:
    """Decodes `rows` prompts together. One Decoder serves one batch after another of the same size and sampling.

    On CUDA a stack without softmax layers is replayed as a CUDA graph, and one of RAD-RWKV7 and SwiGLU layers only runs
    in fused kernels where Triton is installed (fused=False: does without). A row that draws one of stop_ids has ended.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: RadladsForCausalLM,
        rows: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
        *,
        fused: bool = True,
        graphed: bool = True,
    ):
        self.model, self.rows, self.sampling = model, rows, sampling
        device = model.device
        self.next_step = build_step(model, rows, fused=fused)
        self.is_graphed = graphed and device.type == "cuda" and self.next_step.is_graphable
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.emitted = torch.zeros_like(self.tokens)
        self.has_ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.draws = torch.zeros(DRAWS, rows, device=device)
        self.next_draw = torch.zeros(1, dtype=torch.int64, device=device)
        self.generators: list[torch.Generator] = []
        self.logits: torch.Tensor | None = None
        self.graph_logits: torch.Tensor | None = None
        self.num_chosen = 0
        self.num_read: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        piece: int = PREFILL_TOKENS,
        cache: RadladsCache | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        """Read the prompts, one for each row and of any lengths, and choose the first token of each.

        cache: go on from it, as prefill does. generators: as begin's. Raises ValueError for an empty prompt or another
        number of prompts than rows, and NotFinite as prefill does.
        """
        if len(prompts) != self.rows:
            raise ValueError(f"this decoder has {self.rows} rows but got {len(prompts)} prompts: give one for each row")
        tokens, mask = left_padded(prompts, self.model.device)
        self.begin(*prefill(self.model, tokens, mask=mask, piece=piece, cache=cache), generators)

    @torch.inference_mode()
    def begin(
        self, logits: torch.Tensor, cache: RadladsCache, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        """Choose each row's first token by the logits [B, V] of prompts that are read; `cache` is their state.

        generators: random numbers for each row, on the CPU; None: by the sampling's seed and the row. A cache without
        softmax layers stays as it is; another one is taken over and grows.
        """
        assert cache.next_positions is not None
        self.num_read = cache.next_positions.clone()  # a growing cache counts on
        self.next_step.load(cache)
        if self.is_graphed and self.graph is None:
            self._capture()
            self.next_step.load(cache)
        self.has_ended.zero_()
        self.next_draw.zero_()
        self.num_chosen = 0
        self.generators = row_generators(self.sampling, self.rows) if generators is None else list(generators)
        self._refill_draws()
        self._choose(logits)

    def follow_weights(self) -> None:
        """Take over what has changed in the model's parameters, in place, since this decoder was made."""
        self.next_step.follow_weights()

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's token and choose its next one. Returns before the device is done."""
        self._refill_draws()
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()
            self.logits = self.graph_logits

    def generated(self, num_tokens: int) -> Iterator[list[int | None]]:
        """After prefill: the rows' tokens step by step, None where a row has ended; at most num_tokens of each row.

        Raises NotFinite in place of the first token that logits which are not finite would choose.
        """
        pending: deque[Sent] = deque()
        ahead = STEPS_AHEAD if self.tokens.is_cuda else 0
        for index in range(num_tokens + ahead):
            if index < num_tokens:
                if index:
                    self.step()
                pending.append(Sent(self.emitted))
            if index < ahead:
                continue
            if not pending:
                return
            tokens = pending.popleft().read()
            if NOT_FINITE in tokens:
                assert self.num_read is not None
                raise NotFinite(int(self.num_read[tokens.index(NOT_FINITE)]) + index - ahead)
            if all(token == ENDED for token in tokens):
                return
            yield [None if token == ENDED else token for token in tokens]

    def _capture(self) -> None:
        """Record _advance as a graph. Leaves states, draws and tokens changed."""
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # what compiles or allocates at its first call must not be recorded
                self._advance()
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # weights cast earlier would be let go, and replayed all the same
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._advance()
        torch.clear_autocast_cache()
        self.graph, self.graph_logits = graph, self.logits

    def _advance(self) -> None:
        self._choose(self.next_step(self.tokens))

    def _choose(self, logits: torch.Tensor) -> None:
        """Choose and emit each row's next token: all in place, so that it can be replayed.

        Whether the logits are finite goes to the host as the token, since more would cost a wait or a copy.
        """
        draws = self.draws.index_select(0, self.next_draw)[0]
        self.next_draw.add_(1).remainder_(DRAWS)
        self.tokens.copy_(choose(logits, self.sampling, draws))
        is_sound = are_finite(logits).logical_or_(self.has_ended)
        self.has_ended.logical_or_((self.tokens[:, None] == self.stop_ids).any(-1))
        self.emitted.copy_(torch.where(is_sound, self.tokens.masked_fill(self.has_ended, ENDED), NOT_FINITE))
        self.logits = logits

    def _refill_draws(self) -> None:
        """Uniform draws for the next DRAWS tokens, where the last ones are used up."""
        if self.num_chosen % DRAWS == 0 and self.sampling.temperature > 0:
            rows = [torch.rand(DRAWS, generator=generator) for generator in self.generators]
            self.draws.copy_(torch.stack(rows, dim=1))
        self.num_chosen += 1


class Sent:
    """A step's tokens on their way to the host."""

    def __init__(self, tokens: torch.Tensor):
        self.arrived: torch.cuda.Event | None = None
        self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self.tokens.copy_(tokens, non_blocking=True)
        if tokens.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()
