"""The forward and the backward pass of a recurrence by chunks on a GPU: memory, launch sizes, and kernels in order.

Leaves the kernels to gla_triton.py and rwkv7_triton.py, and torch's operators to chunked_operators.py.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk, S sequences.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from .sequences import CHUNK_TOKENS, Sequences, Slots

# Programs of a scan below which a smaller share of the state for each is quicker
FEW_PROGRAMS = 132
# The place of v among a recurrence's inputs
VALUES = 3


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


class Launches(NamedTuple):
    """A recurrence's launch for inputs in bf16, and for all others."""

    bfloat16: Launch
    float32: Launch


class Kernels(NamedTuple):
    """A recurrence's three kernels, each compiled by Triton: `_prepare`, `_scan` and `_gradients`."""

    prepare: Any
    scan: Any
    gradients: Any


class Chunks:
    """One call of a recurrence, whose inputs are like v [B, T, H, N]: shapes, scratch memory and launches.

    numbers: int32 [B, T], of the text that each token is of, if rows hold several; they grow along a row, and the first
    state is the first text's. sequences: what is packed into [1, T, H, N], if anything is; forward alone.

    A subclass is a recurrence. inputs: the names of its arguments, v the fourth. met: the names of what a scan meets on
    its way, the states last. rows: how many rows of reads, mixes and writes a token has.
    """

    inputs: ClassVar[tuple[str, ...]]
    met: ClassVar[tuple[str, ...]]
    rows: ClassVar[int]
    kernels: ClassVar[Kernels]
    launches: ClassVar[Launches]

    def __init__(self, v: torch.Tensor, numbers: torch.Tensor | None = None, sequences: Sequences | None = None):
        self.like, self.numbers = v, numbers
        self.launch = self.launches.bfloat16 if v.dtype == torch.bfloat16 else self.launches.float32
        self.B, self.T, self.H, self.N = v.shape
        self.L = self.launch.chunk
        self.G, self.S = -(-self.T // self.L), self.B
        self.chunks = self.ranges = None
        if sequences is not None:
            assert self.B == 1 and self.L == CHUNK_TOKENS
            self.chunks, self.ranges = sequences.chunks, sequences.ranges
            self.G, self.S = len(sequences.chunks), len(sequences.ranges)

    @classmethod
    def kept(cls) -> tuple[str, ...]:
        """The names of what the forward pass keeps for the backward pass."""
        return *cls.met, "end", "reads", "mixes", "writes"

    @classmethod
    def like_kept(cls, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors shaped as those that are kept for such values."""
        chunks = cls(v)
        return *chunks.memory_met(), chunks.ends(), *chunks.matrices()

    @classmethod
    def forward(cls, *tensors):
        """The output [B, T, H, N] and the last state [B, H, N, N] (fp32), from the inputs, the numbers of texts or
        None, and the first state or None."""
        *inputs, numbers, first = contiguous(*tensors)
        chunks = cls(inputs[VALUES], numbers)
        end, ahead, _ = chunks.prepare(inputs, backward=False)
        out, last, *_ = chunks.scan(ahead, end, inputs[VALUES], first, reverse=False, keep=False)
        return out, last

    @classmethod
    def forward_keeping(cls, *tensors):
        """What `forward` returns, and what is kept."""
        *inputs, numbers, first = contiguous(*tensors)
        chunks = cls(inputs[VALUES], numbers)
        end, ahead, kept = chunks.prepare(inputs, backward=True)
        return *chunks.scan(ahead, end, inputs[VALUES], first, reverse=False, keep=True), end, *kept

    @classmethod
    def backward(cls, *tensors):
        """Gradients of the inputs, and of the first state (fp32), from those of the output and of the last state (or
        None), the inputs, the numbers of texts or None, and what was kept."""
        d_out, d_last, *rest = contiguous(*tensors)
        inputs, (numbers, *kept) = rest[: len(cls.inputs)], rest[len(cls.inputs) :]
        *met, end, reads, mixes, writes = kept
        chunks = cls(inputs[VALUES], numbers)
        back = chunks.matrices_back(reads, mixes, writes)
        dv, d_first, *met_back = chunks.scan(back, end, d_out, d_last, reverse=True, keep=True)
        gradients = chunks.gradients(inputs, d_out, met, met_back, end)
        return *gradients[:VALUES], dv, *gradients[VALUES:], d_first

    @classmethod
    def forward_in_slots(cls, tensors, sequences: Sequences, slots: Slots):
        """The output [T, H, N] of inputs [T, H, N] that hold sequences one after another; their states are read from
        slots and written there. Tokens after the last sequence have no output."""
        inputs = [x[None] for x in contiguous(*tensors)]
        chunks = cls(inputs[VALUES], sequences=sequences)
        end, ahead, _ = chunks.prepare(inputs, backward=False)
        out, *_ = chunks.scan(ahead, end, inputs[VALUES], slots.states, reverse=False, keep=False, slots=slots)
        return out[0]

    def prepare(self, inputs, *, backward: bool):
        """Run `_prepare`: the chunks' ends, the matrices of a scan forward, and those to keep, if `backward`."""
        raise NotImplementedError

    def matrices_back(self, reads, mixes, writes):
        """The matrices of a scan backward, from those that were kept."""
        return reads, mixes, writes

    def scan(self, matrices, end, x, first, *, reverse: bool, keep: bool, slots: Slots | None = None):
        """Run `_scan` on x: what comes out, the last state, and what was met (None without `keep`). slots: where each
        sequence's state is read from and written to; first and last states are then all slots."""
        out = torch.empty_like(x)
        last = last_state(self.like) if slots is None else first
        places = (None, None, None) if slots is None else (slots.first, slots.last, slots.states.stride(0))
        met = self.memory_met() if keep else (None,) * len(self.met)
        values, stages = self.scan_sizes()
        self.kernels.scan[(self.N // values, self.S * self.H)](
            *matrices, end, x, first, out, last, *met, self.ranges, *places, self.T, self.G, self.H,
            N=self.N, L=self.L, BV=values, REVERSE=reverse, KEEP=keep,
            PRECISION=self.launch.precision, num_warps=self.launch.scan_warps, num_stages=stages,
        )  # fmt: skip
        return out, last, *met

    def gradients(self, inputs, d_out, met, met_back, end) -> list[torch.Tensor]:
        """Run `_gradients`: the gradients of all inputs but v, from what the scans forward and backward met."""
        results = [torch.empty_like(x) for place, x in enumerate(inputs) if place != VALUES]
        pairs = (x for pair in zip(met, met_back, strict=True) for x in pair)
        launch, keys = self.launch, min(self.N, self.launch.keys)
        self.kernels.gradients[(self.G, self.B * self.H, self.N // keys)](
            *inputs, self.numbers, d_out, *pairs, end, *results, self.T, self.G, self.H,
            N=self.N, L=self.L, BK=keys, BV=launch.gradient_step, PRECISION=launch.precision,
            num_warps=launch.gradient_warps, maxnreg=launch.gradient_registers,
        )  # fmt: skip
        return results

    def scan_sizes(self) -> tuple[int, int]:
        """Value channels per program of `_scan`, and its pipelining."""
        values = min(self.N, self.launch.values)
        is_small = self.S * self.H * self.N // values < FEW_PROGRAMS
        return self.launch.few if is_small else (values, self.launch.scan_stages)

    def scratch(self, *last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory [B H, G, ...]."""
        return self.like.new_empty((self.B * self.H, self.G, *last), dtype=dtype or self.like.dtype)

    def ends(self) -> torch.Tensor:
        """Memory for the sums of log w over the chunks, fp32."""
        return self.scratch(self.N, dtype=torch.float32)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory for one direction's reads, mixes and writes."""
        rows = self.rows * self.L
        return self.scratch(rows, self.N), self.scratch(rows, self.L), self.scratch(rows, self.N)

    def memory_met(self) -> tuple[torch.Tensor, ...]:
        """Memory for what a scan meets."""
        return (self.scratch(self.N, self.N),)


def last_state(v: torch.Tensor) -> torch.Tensor:
    """Memory for the state [B, H, N, N] fp32 after a sequence v [B, T, H, N]."""
    B, _, H, N = v.shape
    return v.new_empty(B, H, N, N, dtype=torch.float32)


def contiguous(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors, contiguous; None stays None."""
    return tuple(None if x is None else x.contiguous() for x in tensors)
