"""What a context costs: the time to read it, the time of a token after it, and the memory it leaves behind."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from radlads.inference.decoder import prefill
from radlads.inference.generate import decode_ms
from radlads.model.configuration import state_bytes
from radlads.model.modeling import RadladsForCausalLM

RUNS = 3


@dataclass(frozen=True)
class Cost:
    """One sequence of context_tokens. state_bytes: recurrent states (fp32), keys and values (in the model's dtype)."""

    context_tokens: int
    prefill_tokens_per_s: float
    decode_ms: float
    state_bytes: int


def cost_of_context(model: RadladsForCausalLM, tokens: Sequence[int]) -> Cost:
    """Measure reading `tokens` and decoding after them: medians after a warm-up that is not counted."""
    prompt = torch.tensor([list(tokens)], device=model.device)
    seconds = [_seconds_to_read(model, prompt) for _ in range(1 + RUNS)][1:]
    return Cost(
        context_tokens=len(tokens),
        prefill_tokens_per_s=len(tokens) / statistics.median(seconds),
        decode_ms=decode_ms(model, prompt),
        state_bytes=state_bytes(model.config, len(tokens), model.dtype.itemsize),
    )


def _seconds_to_read(model: RadladsForCausalLM, prompt: torch.Tensor) -> float:
    _wait(model.device)
    began = time.perf_counter()
    prefill(model, prompt)
    _wait(model.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
