"""What the Triton kernels of both recurrences share: memory by chunks, sums over tokens, and torch's operators of them.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU need neither
    triton = tl = None

HEAD_SIZES = (64, 128)
# Programs of a scan below which a smaller share of the state for each is quicker
FEW_PROGRAMS = 132


def jit(kernel):
    """triton.jit where triton is there."""
    return kernel if triton is None else triton.jit(kernel)


def jit_for_all_sizes(kernel):
    """As jit, compiled once for all T, G and H: that N divides the offsets is all that their alignment needs."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T", "G", "H"])


@jit
def sums_of_rows(weights, x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """weights x in fp32, weights being multiples of 1/2: running sums of x's rows in the layout that products have.

    Where products are of bf16 numbers, x counts with 16 significant bits, as the sum of two of them.
    """
    high = x.to(dtype)
    total = tl.dot(weights.to(dtype), high, input_precision=PRECISION)
    if dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(dtype)
        total = tl.dot(weights.to(dtype), low, acc=total, input_precision=PRECISION)
    return total


@jit
def last_row(x, L: tl.constexpr):
    """The last of L rows, exactly, as [1, columns]."""
    return tl.sum(tl.where(tl.arange(0, L)[:, None] == L - 1, x, 0.0), axis=0)[None, :]


class Launch(NamedTuple):
    """How a recurrence's kernels run for a dtype. chunk: tokens per chunk. prepare_warps: of `_prepare`, forward alone
    and with what the backward pass needs. values, scan_warps, scan_stages: channels per program of `_scan`, and its
    software pipelining; few: values and stages where there are few sequences and heads. keys, gradient_step: key
    channels per program of `_gradients`, and value channels that it takes at a time; gradient_registers: at most that
    many per thread of it."""

    chunk: int
    precision: str
    prepare_warps: tuple[int, int]
    values: int
    scan_warps: int
    scan_stages: int
    few: tuple[int, int]
    keys: int
    gradient_step: int
    gradient_warps: int
    gradient_registers: int | None


class Chunks:
    """Shapes, scratch memory and launch sizes of one call, whose tensors are like v [B, T, H, N]."""

    def __init__(self, v: torch.Tensor, launch: Launch):
        self.like, self.launch, self.L = v, launch, launch.chunk
        self.B, self.T, self.H, self.N = v.shape
        self.G = -(-self.T // self.L)

    def scan_sizes(self) -> tuple[int, int]:
        """Value channels per program of `_scan`, and its pipelining."""
        values = min(self.N, self.launch.values)
        is_small = self.B * self.H * self.N // values < FEW_PROGRAMS
        return self.launch.few if is_small else (values, self.launch.scan_stages)

    def scratch(self, *last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory [B H, G, ...]."""
        return self.like.new_empty((self.B * self.H, self.G, *last), dtype=dtype or self.like.dtype)

    def ends(self) -> torch.Tensor:
        """Memory for the sums of log w over the chunks, fp32."""
        return self.scratch(self.N, dtype=torch.float32)

    def last_state(self) -> torch.Tensor:
        """Memory for the state after the sequence, [B, H, N, N] fp32."""
        return last_state(self.like)


def last_state(v: torch.Tensor) -> torch.Tensor:
    """Memory for the state [B, H, N, N] fp32 after a sequence v [B, T, H, N]."""
    B, _, H, N = v.shape
    return v.new_empty(B, H, N, N, dtype=torch.float32)


def operator(
    module: str,
    inputs: tuple[str, ...],
    kept: tuple[str, ...],
    *,
    forward: Callable,
    forward_keeping: Callable,
    backward: Callable,
    like_kept: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
) -> tuple[Callable, Any]:
    """A recurrence as operators that torch.compile does not look into: the function to call, and `forward_keeping`'s.

    inputs: [B, T, H, N] each, v fourth; the first state comes after them, and may be None. forward gives the output and
    the last state, forward_keeping also the tensors `kept`, and backward, which is called with the gradients of both
    (the state's may be None), the inputs and what was kept, all gradients. like_kept: tensors shaped as `kept`, for v.
    """
    # Remote code registers its own copy of the operators beside the installed package's
    namespace = re.sub(r"\W", "_", module)
    given, saved = (", ".join(f"Tensor {name}" for name in names) for names in (inputs, kept))

    def define(name: str, function: Callable, arguments: str, num_results: int) -> Any:
        schema = f"({arguments}) -> ({', '.join(['Tensor'] * num_results)})"
        return torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=(), schema=schema)

    run = define("forward", forward, f"{given}, Tensor? first", 2)
    run_keeping = define("forward_keeping", forward_keeping, f"{given}, Tensor? first", 2 + len(kept))
    run_back = define("backward", backward, f"Tensor d_out, Tensor? d_last, {given}, {saved}", len(inputs) + 1)

    @run.register_fake
    def _(*tensors):
        return _like(tensors[3]), last_state(tensors[3])

    @run_keeping.register_fake
    def _(*tensors):
        v = tensors[3]
        return _like(v), last_state(v), *like_kept(v)

    @run_back.register_fake
    def _(d_out, d_last, *tensors):
        return *(_like(x) for x in tensors[: len(inputs)]), last_state(tensors[3])

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output[2:])
        ctx.has_first = inputs[-1] is not None

    def differentiate(ctx, d_out, d_last, *_):
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        d_out = torch.zeros_like(saved[3]) if d_out is None else d_out
        *gradients, d_first = run_back(d_out, d_last, *saved)
        return *gradients, d_first if ctx.has_first else None

    run_keeping.register_autograd(differentiate, setup_context=save)

    def call(*tensors):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            out, last, *_ = run_keeping(*tensors)
            return out, last
        return run(*tensors)

    return call, run_keeping


def contiguous(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors, contiguous; None stays None."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _like(x: torch.Tensor) -> torch.Tensor:
    """What stands for a result shaped as x: contiguous, as the kernels' results are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
