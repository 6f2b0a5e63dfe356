"""What a context costs: the time to read it, the time of a token after it, and the memory it leaves behind."""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from radlads.inference.generate import decode_ms
from radlads.inference.prefill import prefill
from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.modeling import RadladsForCausalLM

RUNS = 3


@dataclass(frozen=True)
class Cost:
    """One sequence of context_tokens, all of it measured.

    state_bytes: the tensors that the cache holds after reading, recurrent states (fp32), keys and values (in the
    model's dtype). peak_bytes: the most that was allocated while reading and decoding beside what was before, the
    weights; None on a CPU, where nobody counts it.
    """

    context_tokens: int
    prefill_tokens_per_s: float
    decode_ms: float
    state_bytes: int
    peak_bytes: int | None


def cost_of_context(model: RadladsForCausalLM, tokens: Sequence[int]) -> Cost:
    """Measure reading `tokens` and decoding after them: medians after a warm-up that is not counted."""
    prompt = torch.tensor([list(tokens)], device=model.device)
    decode_ms(model, prompt, steps=1, warmup=0)  # packs weights at first use, which are then there before the count
    gc.collect()  # decoders of earlier measurements
    before = _begin_peak(model.device)
    reads = [_read(model, prompt) for _ in range(RUNS)]
    ms_a_token = decode_ms(model, prompt)
    return Cost(
        context_tokens=len(tokens),
        prefill_tokens_per_s=len(tokens) / statistics.median(seconds for seconds, _ in reads),
        decode_ms=ms_a_token,
        state_bytes=reads[0][1],
        peak_bytes=None if before is None else torch.cuda.max_memory_allocated(model.device) - before,
    )


def held_bytes(cache: RadladsCache) -> int:
    """The bytes of all tensors that a cache holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(layer) if tensor is not None)


def _tensors(layer: Any) -> tuple[torch.Tensor | None, ...]:
    return (layer.state or ()) if isinstance(layer, RecurrentCacheLayer) else (layer.keys, layer.values)


def _read(model: RadladsForCausalLM, prompt: torch.Tensor) -> tuple[float, int]:
    """The seconds it takes, and the bytes it leaves; the cache itself is let go before the next reading."""
    _wait(model.device)
    began = time.perf_counter()
    _, cache = prefill(model, prompt)
    _wait(model.device)
    return time.perf_counter() - began, held_bytes(cache)


def _begin_peak(device: torch.device) -> int | None:
    """Count the peak from here on; the bytes allocated now."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
