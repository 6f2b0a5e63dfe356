"""A recurrence by chunks as operators of torch's, which torch.compile does not look into."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from .chunked_passes import VALUES, Chunks, last_state


def operator(module: str, chunks: type[Chunks]) -> tuple[Callable, Any]:
    """Register a recurrence's three passes: the function to call, and the operator `forward_keeping`.

    The function takes the inputs, the numbers of texts or None (see Chunks), and the first state or None, and runs the
    pass that keeps something where a gradient is wanted. module: the recurrence's, whose name the operators get.
    """
    run, run_keeping, run_back = _define(namespace_of(module), chunks)
    _register_shapes(chunks, run, run_keeping, run_back)
    _register_gradient(run_keeping, run_back)

    def call(*tensors):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            out, last, *_ = run_keeping(*tensors)
            return out, last
        return run(*tensors)

    return call, run_keeping


def namespace_of(module: str) -> str:
    """What a module's operators are called: remote code registers its own beside the installed package's."""
    return re.sub(r"\W", "_", module)


def _define(namespace: str, chunks: type[Chunks]) -> tuple[Any, Any, Any]:
    """The operators of `forward`, `forward_keeping` and `backward`."""
    given, saved = (", ".join(f"Tensor {name}" for name in names) for names in (chunks.inputs, chunks.kept()))
    given += ", Tensor? numbers"

    def define(name: str, function: Callable, arguments: str, num_results: int) -> Any:
        schema = f"({arguments}) -> ({', '.join(['Tensor'] * num_results)})"
        return torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=(), schema=schema)

    num_inputs, num_kept = len(chunks.inputs), len(chunks.kept())
    return (
        define("forward", chunks.forward, f"{given}, Tensor? first", 2),
        define("forward_keeping", chunks.forward_keeping, f"{given}, Tensor? first", 2 + num_kept),
        define("backward", chunks.backward, f"Tensor d_out, Tensor? d_last, {given}, {saved}", num_inputs + 1),
    )


def _register_shapes(chunks: type[Chunks], run: Any, run_keeping: Any, run_back: Any) -> None:
    """Tell torch.compile the results' shapes."""

    @run.register_fake
    def _(*tensors):
        return like(tensors[VALUES]), last_state(tensors[VALUES])

    @run_keeping.register_fake
    def _(*tensors):
        v = tensors[VALUES]
        return like(v), last_state(v), *chunks.like_kept(v)

    @run_back.register_fake
    def _(d_out, d_last, *tensors):
        return *(like(x) for x in tensors[: len(chunks.inputs)]), last_state(tensors[VALUES])


def _register_gradient(run_keeping: Any, run_back: Any) -> None:
    """Make `run_back` the gradient of `run_keeping`."""

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output[2:])
        ctx.has_first = inputs[-1] is not None

    def differentiate(ctx, d_out, d_last, *_):
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        d_out = torch.zeros_like(saved[VALUES]) if d_out is None else d_out
        *gradients, d_first = run_back(d_out, d_last, *saved)
        return *gradients, None, d_first if ctx.has_first else None

    run_keeping.register_autograd(differentiate, setup_context=save)


def like(x: torch.Tensor) -> torch.Tensor:
    """What stands for a result shaped as x: contiguous, as the kernels' results are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
