"""Decoding a batch of prompts in lockstep: prefill, then one token for every row per step, sampled on the device.

Owns the three ways of taking a step, the CUDA graph around it, and the tokens' way back. Leaves sampling's rules to
sampling.py and the kernels to fused_step.py. Shape letters: B rows, T tokens, C hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from radlads.inference.finite import NotFinite, are_finite, raise_unless_finite
from radlads.inference.sampling import Sampling, choose, row_generators
from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import RadladsForCausalLM, has_triton
from radlads.model.registry import all_can
from radlads.model.rope import rope_attention_factor, rope_inverse_frequencies
from radlads.model.swiglu import SwiGLU

PREFILL_TOKENS = 2048
FUSED_ROWS = 64
# Steps the device may be ahead of the reader; more of them only delay the text and waste work after a stop
STEPS_AHEAD = 2
DRAWS = 1024
# Instead of a token: the row has ended; its logits were not finite
ENDED, NOT_FINITE = -1, -2


class Step(Protocol):
    """One token for all rows. load() takes over a prefilled cache; a call maps tokens [B] to the next logits [B, V].

    is_graphable: a call does the same to the same memory every time, so that it can be replayed.
    """

    is_graphable: bool

    def load(self, cache: RadladsCache) -> None: ...

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor: ...


class CachedStep:
    """The model's own forward with its growing cache: for stacks with softmax layers."""

    is_graphable = False

    def __init__(self, model: RadladsForCausalLM):
        self.model = model
        self.cache: RadladsCache | None = None

    def load(self, cache: RadladsCache) -> None:
        self.cache = cache

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]


class RecurrentStep:
    """The model's own blocks, for any stack without softmax layers, with states that stay at their place in memory."""

    def __init__(self, model: RadladsForCausalLM):
        self.model = model
        self.is_graphable = all_can(model.config, "CUDA graph")
        self.cache = RadladsCache(model.config)
        self.positions: torch.Tensor | None = None
        self.frequencies = torch.tensor(rope_inverse_frequencies(model.config), device=model.device)

    def load(self, cache: RadladsCache) -> None:
        """Copy the cache's states; the memory they go to is taken at the first call."""
        assert cache.next_positions is not None
        if self.positions is None:
            self.positions = torch.empty_like(cache.next_positions)
            for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
                held.state = _state_like(given.state)
        self.positions.copy_(cache.next_positions)
        for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
            _copy_state(held.state, given.state)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.positions is not None
        model, layers = self.model.model, self._layers(self.cache)
        held = [layer.state for layer in layers]
        angles = self.positions[:, None, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        shared = SharedInputs(angles.cos(), angles.sin())
        hidden, v_first = model.embed_tokens(tokens[:, None]), None
        for block in model.layers:
            hidden, v_first = block(hidden, v_first, shared, past_key_values=self.cache)
        for layer, state in zip(layers, held, strict=True):
            _copy_state(state, layer.state)
            layer.state = state
        self.positions.add_(1)
        return self.model.lm_head(model.norm(hidden))[:, -1]

    @staticmethod
    def _layers(cache: RadladsCache) -> list[RecurrentCacheLayer]:
        return [layer for layer in cache.layers if isinstance(layer, RecurrentCacheLayer)]


def _state_like(state: Any) -> Any:
    return type(state)(*(None if x is None else torch.empty_like(x) for x in state))


def _copy_state(into: Any, state: Any) -> None:
    for target, source in zip(into, state, strict=True):
        if target is not None:
            target.copy_(source)


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
        self, prompts: Sequence[Sequence[int]], *, piece: int = PREFILL_TOKENS, cache: RadladsCache | None = None
    ) -> None:
        """Read the prompts, one for each row and of any lengths, and choose the first token of each.

        cache: go on from it, as prefill does. Raises ValueError for an empty prompt or another number of prompts than
        rows, and NotFinite as prefill does.
        """
        if len(prompts) != self.rows:
            raise ValueError(f"this decoder has {self.rows} rows but got {len(prompts)} prompts: give one for each row")
        tokens, mask = left_padded(prompts, self.model.device)
        self.begin(*prefill(self.model, tokens, mask=mask, piece=piece, cache=cache))

    @torch.inference_mode()
    def begin(self, logits: torch.Tensor, cache: RadladsCache) -> None:
        """Choose each row's first token by the logits [B, V] of prompts that are read; `cache` is their state.

        A cache without softmax layers stays as it is; another one is taken over and grows.
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
        self.generators = row_generators(self.sampling, self.rows)
        self._refill_draws()
        self._choose(logits)

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
        pending: deque[_Sent] = deque()
        ahead = STEPS_AHEAD if self.tokens.is_cuda else 0
        for index in range(num_tokens + ahead):
            if index < num_tokens:
                if index:
                    self.step()
                pending.append(_Sent(self.emitted))
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


class _Sent:
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


def build_step(model: RadladsForCausalLM, rows: int, *, fused: bool = True) -> Step:
    """The fastest way of taking a step that this model, device and number of rows allow."""
    if len(model.config.recurrent_layers) < model.config.num_hidden_layers:
        return CachedStep(model)
    if fused and model.device.type == "cuda" and has_triton(model.device) and can_be_fused(model, rows):
        from radlads.inference.fused_step import FusedStep

        return FusedStep(model, rows)
    return RecurrentStep(model)


def can_be_fused(model: RadladsForCausalLM, rows: int) -> bool:
    """True if the fused kernels cover the model: mixers that are made for them (RAD-RWKV7) and SwiGLU layers, head size
    64 or 128, one dtype and device, queries and keys that are neither normed nor scaled (yarn)."""
    blocks = model.model.layers
    return (
        rows <= FUSED_ROWS
        and model.config.head_dim in (64, 128)
        and not model.config.qk_norm
        and rope_attention_factor(model.config) == 1.0
        and all(type(block.self_attn).obstacle("fused decode") is None for block in blocks)
        and all(type(block.mlp) is SwiGLU for block in blocks)
        and len({(parameter.dtype, parameter.device) for parameter in model.parameters()}) == 1
    )


@torch.inference_mode()
def prefill(
    model: RadladsForCausalLM,
    tokens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    piece: int = PREFILL_TOKENS,
    cache: RadladsCache | None = None,
) -> tuple[torch.Tensor, RadladsCache]:
    """Read tokens [B, T] in pieces; the logits [B, V] after the last one, and the cache.

    mask: [B, T], 0 at padding. cache: the state of what was read before, which is brought up to date in place. Raises
    NotFinite, after the whole text, for logits at the end of a piece that are not finite.
    """
    cache = RadladsCache(model.config) if cache is None else cache
    masks = [None] * -(-tokens.shape[1] // piece) if mask is None else mask.split(piece, dim=1)
    num_tokens, flags = cache.get_seq_length(), []
    for part, part_mask in zip(tokens.split(piece, dim=1), masks, strict=True):
        logits = model(part, part_mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        num_tokens += part.shape[1]
        flags.append((num_tokens, are_finite(logits).all()))
    raise_unless_finite(flags)
    return logits, cache


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as [B, T] tokens that end together, and a mask, False at padding; None where all are equally long.

    Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("the prompt is empty: give at least one token to continue")
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens, None
    return tokens, torch.arange(longest, device=device) >= longest - lengths[:, None]
