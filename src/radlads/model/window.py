"""Softmax attention over the last and the first tokens, which a recurrent mixer may have beside its recurrence.

RecurrentMixer.finish adds it to the recurrence's output. It is exact, and its time and memory are linear in the length.
Here are the settings, the state and what the planner counts; window_attention.py computes it.

Shape letters: B batch, T tokens, H query heads, K key/value heads, N head size, W window, S sinks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .mixer_settings import added
from .time_mixer import StateTensor, Use
from .window_triton import HALF

if TYPE_CHECKING:
    from .configuration import RadladsConfig

OBSTACLES: Mapping[Use, str] = {
    "llama.cpp": "it has no softmax window inside a recurrent layer (window_tokens)",
    "published format": "it has no softmax window inside a recurrent layer (window_tokens)",
}
"""What a mixer with a window cannot be used for."""


@dataclass(frozen=True)
class WindowSettings:
    """Of the recurrent mixers. With window_tokens 0 they are the paper's."""

    window_tokens: int = added(0)
    """Add the teacher's softmax attention over this many last tokens, the token itself included, to the recurrence; 0:
    none. The state keeps their keys and values."""
    sink_tokens: int = added(0)
    """Let that attention see this many first tokens of the text as well. It needs window_tokens."""

    def __post_init__(self):
        for name in ("window_tokens", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.sink_tokens and not self.window_tokens:
            raise ValueError(
                f"sink_tokens is {self.sink_tokens}, but there is no window that could see them: set window_tokens too"
            )

    @property
    def held_tokens(self) -> int:
        """Number of tokens whose keys and values the state has room for."""
        return self.window_tokens + self.sink_tokens


class HeldWindow(NamedTuple):
    """The window's part of a state (contracts.WindowedState).

    keys, values: [B, K, S + W, N]. Token p of the text, counted from 0, is in slot p if p < S, and else in slot
    S + (p - S) mod W, which the token W before it leaves. So slots fill in order, and all that are filled are seen.
    seen: [B] int64, the number of tokens so far.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor


def window_of(config: "RadladsConfig", layer_idx: int) -> WindowSettings | None:
    """A layer's window; None if it has none.

    Raises ValueError for one that the model cannot have.
    """
    settings = config.settings_of(layer_idx)
    # By name: transformers loads an export's modules twice, and the configuration's class is another one then
    if WindowSettings.__name__ not in {kind.__name__ for kind in type(settings).__mro__} or not settings.window_tokens:
        return None
    if settings.held_tokens > config.max_position_embeddings:
        raise ValueError(
            f"model.mixer.window_tokens {settings.window_tokens} and sink_tokens {settings.sink_tokens} are more than "
            f"the {config.max_position_embeddings} tokens of the model's context: give fewer"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"model.mixer.window_tokens needs an even head_dim for RoPE, not {config.head_dim}: leave it out"
        )
    return settings


def held_tensors(config: "RadladsConfig", window: WindowSettings) -> dict[str, StateTensor]:
    """The tensors of HeldWindow for TimeMixer.state_tensors."""
    shape = config.num_key_value_heads, window.held_tokens, config.head_dim
    return {"keys": StateTensor(shape), "values": StateTensor(shape), "seen": StateTensor((), torch.int64)}


def kept_bytes(config: "RadladsConfig", window: WindowSettings) -> float:
    """Bytes per token that the attention keeps for the backward pass under bf16 on a GPU, as counted, not measured.

    What the kernels keep (window_triton.py) beside the recurrence's r and the keys, which are counted with it: the
    values before they are repeated over groups, the output, and an fp32 number for each query. Queries and keys count
    too if they are rotated for the window alone. Last, what recurrent_scale multiplies.
    """
    H, K, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rotated = 0 if config.use_rope else 2 * (H + K) * N
    return rotated + 2 * K * N + 2 * H * N + 4 * H + 2 * H * N


def backward_bytes(config: "RadladsConfig", window: WindowSettings) -> float:
    """Bytes per token of the gradients of the output, queries, keys and values, of an fp32 number for each query, and
    of what each block of queries adds to the sinks' gradients, in fp32."""
    H, K, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return 2 * (2 * H * N + 2 * K * N) + 4 * H + 2 * 4 * H * N * window.sink_tokens / HALF.block
