"""Generation token by token through the cache: constant time and memory per token in a recurrent model.

Owns prefill in pieces, sampling and stopping. Leaves text to the tokenizer's decoder (`stream_text`).
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM

PREFILL_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in;
    seed None draws another text every time. max_tokens bounds the tokens generated."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0 or self.max_tokens < 1:
            raise ValueError("top_k must be 0 or more, and max_tokens 1 or more")


@torch.inference_mode()
def stream_tokens(
    model: RadladsForCausalLM, prompt_ids: list[int], sampling: Sampling, stop_ids: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Yield generated token ids until one of `stop_ids` (not yielded) or max_tokens.

    Raises ValueError for an empty prompt and for one whose keys and values would not fit into memory.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token to continue")
    check_memory(model.config, len(prompt_ids) + sampling.max_tokens, model.device)
    generator = torch.Generator(model.device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    logits, cache = prefill(model, torch.tensor([prompt_ids], device=model.device))
    for _ in range(sampling.max_tokens):
        token = choose(logits[0], sampling, generator)
        if token in stop_ids:
            return
        yield token
        logits = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True).logits[
            :, -1
        ]


def stream_text(
    model: RadladsForCausalLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, whole characters only. Errors as stream_tokens."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    decoder = DecodeStream(skip_special_tokens=True)
    for token in stream_tokens(model, prompt_ids, sampling, stop_ids):
        piece = decoder.step(tokenizer, token)
        if piece:
            yield piece


@torch.inference_mode()
def prefill(
    model: RadladsForCausalLM, tokens: torch.Tensor, *, piece: int = PREFILL_TOKENS
) -> tuple[torch.Tensor, RadladsCache]:
    """Read tokens [B, T] in pieces; the logits [B, V] after the last one, and the cache."""
    cache = RadladsCache(model.config)
    for part in tokens.split(piece, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1], cache


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token id from logits, after temperature, top-k and top-p (the smallest set of that probability)."""
    logits_V = logits_V.float()
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.top_k:
        smallest = logits_V.topk(min(sampling.top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, float("-inf"))
    if sampling.top_p < 1:
        probabilities, order = logits_V.softmax(-1).sort(descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits_V[order[beyond]] = float("-inf")
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def check_memory(config: RadladsConfig, context_tokens: int, device: torch.device) -> None:
    """Raise ValueError if the state after `context_tokens` would not fit into the memory that is free."""
    needed = state_bytes(config, context_tokens, bytes_per_value=4)
    free = available_bytes(device)
    if needed > free:
        raise ValueError(
            f"{context_tokens} tokens need {needed / 1e9:.1f} GB of state, but {free / 1e9:.1f} GB are free: "
            "shorten the prompt, or use a student without softmax layers"
        )


def available_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # Linux: what is free and what could be freed
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def decode_ms(model: RadladsForCausalLM, tokens: torch.Tensor, *, steps: int = 50, warmup: int = 10) -> float:
    """Median milliseconds per token when decoding after the prompt `tokens` [B, T]."""
    _, cache = prefill(model, tokens)
    token, times = tokens[:, -1:], []
    for _ in range(warmup + steps):
        began = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        if token.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times[warmup:])[steps // 2]
