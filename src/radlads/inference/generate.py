"""Generation: a prompt or a batch of them in, tokens or text out as they come, and how long a token takes.

Leaves the steps to the decoder, and text to the tokenizer's decoder (`stream_text`).
"""

import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from radlads.checkpoint.tokenizer_files import num_ids
from radlads.inference.decoder import Decoder
from radlads.inference.prefill import prefill
from radlads.inference.prompts import prompt_ids
from radlads.inference.sampling import Sampling, choose
from radlads.inference.saved_state import ReadText
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM

__all__ = [
    "Sampling",
    "choose",
    "choose_device",
    "decode_ms",
    "decoded",
    "generate_tokens",
    "prefill",
    "stream_rows",
    "stream_text",
    "stream_tokens",
]

# How tokenizers with byte fallback, such as Llama 2's, name a token that is a single byte
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def stream_tokens(
    model: RadladsForCausalLM,
    prompt_ids: list[int],
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    *,
    after: ReadText | None = None,
) -> Iterator[int]:
    """Yield generated token ids until one of `stop_ids` (not yielded) or max_tokens.

    after: the text that the prompt goes on from; the prompt may then be empty. Raises ValueError for an empty prompt
    otherwise and for one whose state would not fit into memory.
    """
    for (token,) in stream_rows(model, [prompt_ids], sampling, stop_ids, after=after):
        assert token is not None
        yield token


def generate_tokens(
    model: RadladsForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    *,
    after: ReadText | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, as stream_tokens would yield it with the seed plus the prompt's number."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for tokens in stream_rows(model, prompts, sampling, stop_ids, after=after):
        for continuation, token in zip(continuations, tokens, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


def stream_rows(
    model: RadladsForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    *,
    after: ReadText | None = None,
) -> Iterator[list[int | None]]:
    """Yield one token for every prompt at a time, None for those that have ended. Arguments, errors: stream_tokens."""
    if not prompts:
        return
    if after is not None:
        prompts = [[*after.tail, *prompt] for prompt in prompts]
    if not all(prompts):
        raise ValueError("the prompt is empty: give at least one token to continue")
    longest = max(len(prompt) for prompt in prompts) + (after.cache.get_seq_length() if after else 0)
    check_memory(model.config, longest + sampling.max_tokens, model.device, rows=len(prompts))
    decoder = Decoder(model, len(prompts), sampling, stop_ids)
    decoder.prefill(prompts, cache=after.rows(len(prompts)) if after else None)
    yield from decoder.generated(sampling.max_tokens)


def stream_text(
    model: RadladsForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    stop_ids: frozenset[int],
    after: ReadText | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, whole characters only. `after`, errors: as stream_tokens.

    Ids that the tokenizer has no token for are never drawn.
    """
    sampling = replace(sampling, num_ids=sampling.num_ids or num_ids(tokenizer))
    ids = prompt_ids(tokenizer, prompt, continues=after is not None)
    yield from decoded(tokenizer, stream_tokens(model, ids, sampling, stop_ids, after=after))


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, whole characters only, without special tokens.

    The pieces together are the text that the tokenizer makes of all tokens: a last character that is not whole comes
    at the end, as a replacement character.
    """
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.step(token):
            yield piece
    if rest := stream.rest():
        yield rest


class TextStream:
    """Tokens to text one by one. skips_special: leave out special tokens.

    Tokens of single bytes are held back until another token follows: one wrong byte makes replacement characters of all
    that stand together, whole characters before it too.
    """

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool = True):
        self._tokenizer, self._skips_special = tokenizer, skips_special
        self._stream = DecodeStream(skip_special_tokens=skips_special)
        added = tokenizer.get_added_tokens_decoder().items()
        self._skipped = {token for token, what in added if what.special and skips_special}
        self._tokens: list[int] = []
        self._held: list[int] = []
        self._num_characters = 0

    def step(self, token: int) -> str:
        """What a token adds to the text: nothing while a character is not whole."""
        self._tokens.append(token)
        if _BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") or (self._held and token in self._skipped):
            self._held.append(token)
            return ""
        piece = self._stream.step(self._tokenizer, [*self._held, token]) or ""
        self._held = []
        self._num_characters += len(piece)
        return piece

    def rest(self) -> str:
        """What is missing of the text after the last token: bytes held back, replacement characters if one was not
        whole."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skips_special)
        return text[self._num_characters :]


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """Where to run and in which dtype, for "auto", "cpu" or "cuda": bf16 on a GPU, fp32 on a CPU; auto prefers a GPU.

    Raises ValueError for cuda without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("there is no CUDA GPU that PyTorch can use here: choose --device cpu, or leave it out")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), torch.bfloat16


def check_memory(config: RadladsConfig, context_tokens: int, device: torch.device, *, rows: int = 1) -> None:
    """Raise ValueError if the states of `rows` prompts after `context_tokens` each would not fit into free memory."""
    needed = rows * state_bytes(config, context_tokens, bytes_per_value=4)
    free = available_bytes(device)
    if needed > free:
        raise ValueError(
            f"{context_tokens} tokens in {rows} rows need {needed / 1e9:.1f} GB of state, but {free / 1e9:.1f} GB are "
            "free: shorten the prompt, give fewer prompts at a time, or use a student without softmax layers"
        )


def available_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # Linux: what is free and what could be freed
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def decode_ms(model: RadladsForCausalLM, tokens: torch.Tensor, *, steps: int = 50, warmup: int = 10) -> float:
    """Median milliseconds per step when decoding greedily after the prompts `tokens` [B, T], as generation does."""
    decoder = Decoder(model, tokens.shape[0], Sampling(temperature=0))
    decoder.prefill(tokens.tolist())
    for _ in range(warmup):
        decoder.step()
    times = _gpu_ms(decoder, steps) if tokens.is_cuda else _cpu_ms(decoder, steps)
    return sorted(times)[steps // 2]


def _gpu_ms(decoder: Decoder, steps: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        decoder.step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _cpu_ms(decoder: Decoder, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        decoder.step()
        times.append(1000 * (time.perf_counter() - began))
    return times
