"""A recurrent mixer's softmax window on a CUDA GPU: memory, launches, and the operators that torch.compile takes whole.

Shape letters: B batch, T tokens, H query heads, K key/value heads, G = H / K, N head size, W window, S sinks, M blocks
of queries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .chunked_operators import like, namespace_of
from .chunked_passes import contiguous
from .window_kernels import SINK_TILE, attend, gradients_of_keys, gradients_of_queries

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """How the kernels run for a dtype. block: queries or keys per program. query_warps, key_warps: of a program with a
    block of queries, or of keys. stages: software pipelining at a text's start; with a state, where keys have two
    sources, there is none."""

    block: int
    precision: str
    query_warps: int
    key_warps: int
    stages: int


# By what ptxas says of registers and shared memory for compute capability 9.0: two programs of queries fit into a
# multiprocessor, and nothing spills at a text's start. Not measured
HALF = Launch(block=64, precision="tf32", query_warps=4, key_warps=8, stages=2)
# fp32's products are exact rather than fast; in 4 warps queries would spill ten times as much
FLOAT32 = Launch(block=32, precision="ieee", query_warps=8, key_warps=8, stages=1)


class Call:
    """One call: its shapes, and how its kernels are launched."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None, window: int, sinks: int):
        self.like, self.is_held, self.window, self.sinks = q, seen is not None, window, sinks
        (self.B, self.T, self.H, self.N), self.K = q.shape, k.shape[2]
        self.launch = FLOAT32 if q.dtype == torch.float32 else HALF
        self.M = -(-self.T // self.launch.block)

    def per_query(self) -> torch.Tensor:
        """Memory for an fp32 number of each query, [B, H, T]."""
        return self.like.new_empty(self.B, self.H, self.T, dtype=torch.float32)

    def of_queries(self, kernel, *tensors) -> None:
        """Launch a kernel whose programs have a block of queries each."""
        grid = self.M, self.B * self.H
        self._run(kernel[grid], *tensors, num_warps=self.launch.query_warps, TILE=SINK_TILE)

    def of_keys(self, kernel, *tensors) -> None:
        """Launch a kernel whose programs have a block of keys each; blocks of held ones come first."""
        grid = self.blocks_before + self.M, self.B * self.K
        self._run(kernel[grid], *tensors, num_warps=self.launch.key_warps)

    @property
    def blocks_before(self) -> int:
        """Blocks of held keys that queries are near to."""
        return -(-(self.window - 1) // self.launch.block) if self.is_held else 0

    def _run(self, kernel, *tensors, **constants) -> None:
        kernel(
            *tensors, self.T, self.H // self.K, self.H,
            W=self.window, S=self.sinks, N=self.N, BLOCK=self.launch.block, HELD=self.is_held,
            SCALE=self.N**-0.5 * math.log2(math.e), PRECISION=self.launch.precision,
            num_stages=1 if self.is_held else self.launch.stages, **constants,
        )  # fmt: skip


def _forward(q, k, v, keys, values, seen, window: int, sinks: int):
    """The output [B, T, H, N] and, for the backward pass, the logarithms of the softmax's sums [B, H, T]."""
    q, k, v, keys, values, seen = contiguous(q, k, v, keys, values, seen)
    call = Call(q, k, seen, window, sinks)
    out, log_sums = torch.empty_like(q), call.per_query()
    call.of_queries(attend, q, k, v, keys, values, seen, out, log_sums)
    return out, log_sums


def _backward(d_out, q, k, v, keys, values, seen, out, log_sums, window: int, sinks: int):
    """Gradients of q, k, v, and of the keys and values held (empty without)."""
    d_out, q, k, v, keys, values, seen = contiguous(d_out, q, k, v, keys, values, seen)
    call = Call(q, k, seen, window, sinks)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), call.per_query()
    d_keys, d_values = _zeros_held(k, keys), _zeros_held(k, values)
    parts = call.H // call.K * call.M
    of_sinks = q.new_empty(2, call.B, call.K, parts, sinks, call.N, dtype=torch.float32)
    held = keys, values, seen
    call.of_queries(gradients_of_queries, d_out, q, k, v, *held, out, log_sums, dq, delta, *of_sinks)
    of_sinks = of_sinks.sum(3)
    call.of_keys(gradients_of_keys, d_out, q, k, v, *held, log_sums, delta, *of_sinks, dk, dv, d_keys, d_values)
    if seen is not None and sinks:
        # Sinks that lie before all blocks of keys
        first = seen - call.blocks_before * call.launch.block
        far = (torch.arange(sinks, device=seen.device) < first[:, None])[:, None, :, None]
        for gradient, of_far in zip((d_keys, d_values), of_sinks, strict=True):
            gradient[:, :, :sinks] += torch.where(far, of_far, 0.0).to(gradient.dtype)
    return dq, dk, dv, d_keys, d_values


def _zeros_held(k: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """Memory for the gradient of what is held; nothing without."""
    return k.new_empty(0) if held is None else torch.zeros_like(held, memory_format=torch.contiguous_format)


_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? keys, Tensor? values, Tensor? seen"
_SIZES = "int window, int sinks"


def _operator(name: str, function, schema: str):
    return torch.library.custom_op(f"{namespace_of(__name__)}::{name}", function, mutates_args=(), schema=schema)


_run = _operator("forward", _forward, f"({_GIVEN}, {_SIZES}) -> (Tensor, Tensor)")
_run_back = _operator(
    "backward",
    _backward,
    f"(Tensor d_out, {_GIVEN}, Tensor out, Tensor log_sums, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_run.register_fake
def _(q, k, v, keys, values, seen, window, sinks):
    return like(q), Call(q, k, seen, window, sinks).per_query()


@_run_back.register_fake
def _(d_out, q, k, v, keys, values, seen, out, log_sums, window, sinks):
    return *map(like, (q, k, v)), _zeros_held(k, keys), _zeros_held(k, values)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.window, ctx.sinks = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, d_out, _):
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    seen, out = saved[5], saved[6]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    dq, dk, dv, d_keys, d_values = _run_back(d_out, *saved, ctx.window, ctx.sinks)
    of_held = (None, None) if seen is None else (d_keys, d_values)
    return dq, dk, dv, *of_held, None, None, None


_run.register_autograd(_differentiate, setup_context=_save)


def attend_by_kernels(q_BTHN, k_BTKN, v_BTKN, keys, values, seen, *, window_tokens: int, sink_tokens: int):
    """Softmax attention to the last window_tokens and the first sink_tokens (window_reference); out as q.

    All of one dtype of DTYPES, N of HEAD_SIZES. keys, values [B, K, S + W, N] and seen [B] int64 as in HeldWindow; None
    at a text's start. bf16 and fp16: products of such numbers summed in fp32.
    """
    return _run(q_BTHN, k_BTKN, v_BTKN, keys, values, seen, window_tokens, sink_tokens)[0]
