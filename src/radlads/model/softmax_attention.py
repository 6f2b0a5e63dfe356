"""Causal softmax attention with grouped key/value heads and RoPE: the teacher's mixer, and that of mixed stacks."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .configuration import RadladsConfig
from .contracts import SharedInputs
from .layers import apply_rope


class KeyValueState(Protocol):
    """A softmax mixer's state: append() stores new keys and values [B, kv heads, T, N] and returns all of them."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class SoftmaxAttention(nn.Module):
    """Qwen2's attention: q, k and v with biases, o without, RoPE, scores scaled by N^-1/2."""

    def __init__(self, config: RadladsConfig, layer_idx: int):
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, state: KeyValueState | None, v_first, shared: SharedInputs):
        """See contracts.TimeMixer; `state` is a KeyValueState, or None when nothing needs to be kept."""
        B, T, _ = x.shape
        q = apply_rope(self.q_proj(x).view(B, T, -1, self.head_dim), shared.cos, shared.sin).transpose(1, 2)
        k = apply_rope(self.k_proj(x).view(B, T, -1, self.head_dim), shared.cos, shared.sin).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if state is not None:
            k, v = state.append(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            attn_mask=shared.attention_mask,
            is_causal=shared.attention_mask is None and T > 1,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), state, v_first
