"""Causal softmax attention with grouped key/value heads and RoPE: the teacher's mixer, and that of mixed stacks."""

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .contracts import SharedInputs
from .layers import RMSNorm, apply_rope
from .rope import rope_attention_factor
from .time_mixer import MixerWeights, TimeMixer

if TYPE_CHECKING:
    from .configuration import RadladsConfig


class KeyValueState(Protocol):
    """A softmax mixer's state: append() stores new keys and values [B, kv heads, T, N] and returns all of them."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class SoftmaxAttention(TimeMixer):
    """Attention with RoPE and scores scaled by N^-1/2: Qwen2's (q, k and v with biases, o without), Llama's (no biases)
    and Qwen3's (no biases; q_norm and k_norm over each head, before RoPE)."""

    title = "softmax attention"
    state_grows = True
    made_for: ClassVar = frozenset({"vLLM", "published format", "CUDA graph", "packed rows"})
    obstacles: ClassVar = {
        "llama.cpp": "it has no softmax layers beside recurrent ones",
        "fused decode": "its state grows with the text",
    }

    def __init__(self, config: "RadladsConfig", layer_idx: int):
        super().__init__()
        self.head_dim, self.rope_factor = config.head_dim, rope_attention_factor(config)
        query_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: torch.Tensor, state: KeyValueState | None, v_first, shared: SharedInputs):
        """See TimeMixer.forward; `state` is a KeyValueState, or None when nothing needs to be kept."""
        B, T, _ = x.shape
        q, k, v = (each.transpose(1, 2) for each in self.queries_keys_values(x, shared))
        if state is not None:
            k, v = state.append(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            attn_mask=shared.attention_mask,
            is_causal=shared.attention_mask is None and bool(T > 1),
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), state, v_first

    def queries_keys_values(self, x: torch.Tensor, shared: SharedInputs):
        """Of x [B, T, C]: queries [B, T, H, N], keys and values [B, T, key/value heads, N], as attention reads them."""
        B, T, _ = x.shape
        q, k = self.q_proj(x).view(B, T, -1, self.head_dim), self.k_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, shared.cos, shared.sin, self.rope_factor)
        k = apply_rope(k, shared.cos, shared.sin, self.rope_factor)
        return q, k, self.v_proj(x).view(B, T, -1, self.head_dim)

    def reset_fresh_parameters(self) -> None:
        """See TimeMixer. Nothing is fresh."""

    @classmethod
    def product_weights(cls, config: "RadladsConfig", layer_idx: int) -> MixerWeights:
        """See TimeMixer."""
        C, D, D_kv = _sizes(config)
        return MixerWeights(C * (D + 2 * D_kv), D * C)

    @classmethod
    def mixing_flops(cls, config: "RadladsConfig", layer_idx: int, context_tokens: float) -> float:
        """See TimeMixer. Scores and their sum over all earlier tokens."""
        return 4 * config.num_attention_heads * config.head_dim * context_tokens

    @classmethod
    def kept_bytes(cls, config: "RadladsConfig", layer_idx: int, *, wide: bool) -> float:
        """See TimeMixer. The input, q, k and v as attention reads them, its output, and fp32 sums of each row's
        scores."""
        C, D, D_kv = _sizes(config)
        return 2 * C + 2 * (D + 2 * D_kv) + 2 * D + 4 * config.num_attention_heads

    @classmethod
    def backward_bytes(cls, config: "RadladsConfig", layer_idx: int) -> float:
        """See TimeMixer. The gradients of its output, and of q, k and v."""
        _, D, D_kv = _sizes(config)
        return 2 * D + 2 * (D + 2 * D_kv)


def _sizes(config: "RadladsConfig") -> tuple[int, int, int]:
    """Hidden size, size of all query heads, size of all key/value heads."""
    size = config.head_dim
    return config.hidden_size, config.num_attention_heads * size, config.num_key_value_heads * size
