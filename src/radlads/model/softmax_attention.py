"""Causal softmax attention with grouped key/value heads and RoPE: the teacher's mixer, and that of mixed stacks."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .configuration import RadladsConfig, rope_attention_factor
from .contracts import SharedInputs
from .layers import RMSNorm, apply_rope


class KeyValueState(Protocol):
    """A softmax mixer's state: append() stores new keys and values [B, kv heads, T, N] and returns all of them."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class SoftmaxAttention(nn.Module):
    """Attention with RoPE and scores scaled by N^-1/2: Qwen2's (q, k and v with biases, o without), Llama's (no biases)
    and Qwen3's (no biases; q_norm and k_norm over each head, before RoPE)."""

    def __init__(self, config: RadladsConfig, layer_idx: int):
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
        """See contracts.TimeMixer; `state` is a KeyValueState, or None when nothing needs to be kept."""
        B, T, _ = x.shape
        q, k = self.q_proj(x).view(B, T, -1, self.head_dim), self.k_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, shared.cos, shared.sin, self.rope_factor).transpose(1, 2)
        k = apply_rope(k, shared.cos, shared.sin, self.rope_factor).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
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
