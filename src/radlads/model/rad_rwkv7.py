"""RAD-RWKV7: the generalised delta rule with data-dependent decay.

balance_state: the key is scaled by (1 - w + a), else by the learned k_k and k_a. groupnorm_att: the output has a
GroupNorm, else it is scaled by N^-1/2. The paper's variant is balanced without the norm, the released 7B configuration
has it the other way round.
Shape letters: B batch, T tokens, C hidden size, D = H * N, H heads, N head size.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .contracts import RecurrentState, SharedInputs
from .layers import depth_fraction, repeat_heads
from .recurrence import rwkv7
from .recurrent_mixer import Mixed, RecurrentMixer, zero_at_padding
from .rwkv7_triton import BFLOAT16

if TYPE_CHECKING:
    from .configuration import RadladsConfig

MIN_LOG_DECAY = -math.exp(-0.5)


class RadRwkv7(RecurrentMixer):
    """RAD-RWKV7 time mixer (paper eq. 22-33). No token shift, no bonus."""

    title = "RAD-RWKV7"
    variants: ClassVar = {
        "balanced": {"balance_state": 1, "groupnorm_att": 0},
        "group_norm": {"balance_state": 0, "groupnorm_att": 1},
    }
    shares_first_values = True
    decay_and_shift = ("w[012]",)
    kind = "rwkv7"
    state_flops = 9  # decay 1, write 2, read 2; the removal: find 2, take away 2
    made_for: ClassVar = frozenset({"vLLM", "published format", "CUDA graph", "fused decode", "packed rows"})
    obstacles: ClassVar = {
        "llama.cpp": "it has no RAD-RWKV7 (its ARWKV7 lacks the biases of q, k and v, RoPE and the balanced state)"
    }

    def __init__(self, config: "RadladsConfig", layer_idx: int):
        super().__init__(config, layer_idx)
        C, D = config.hidden_size, self.num_heads * self.head_dim
        self.w0 = nn.Parameter(torch.empty(1, 1, D))
        self.w1 = nn.Parameter(torch.empty(C, config.lora_rank_decay))
        self.w2 = nn.Parameter(torch.empty(config.lora_rank_decay, D))
        self.a0 = nn.Parameter(torch.empty(1, 1, D))
        self.a1 = nn.Parameter(torch.empty(C, config.lora_rank_iclr))
        self.a2 = nn.Parameter(torch.empty(config.lora_rank_iclr, D))
        self.is_first_value_layer = layer_idx == config.first_value_layer
        if not self.is_first_value_layer:
            self.v0 = nn.Parameter(torch.empty(1, 1, D))
            self.v1 = nn.Parameter(torch.empty(C, config.lora_rank_value_residual_mix))
            self.v2 = nn.Parameter(torch.empty(config.lora_rank_value_residual_mix, D))
        if not config.balance_state:
            self.k_k = nn.Parameter(torch.empty(1, 1, D))
            self.k_a = nn.Parameter(torch.empty(1, 1, D))
        self.reset_fresh_parameters()

    def reset_fresh_parameters(self) -> None:
        super().reset_fresh_parameters()
        D = self.num_heads * self.head_dim
        channel = torch.arange(D) / max(1, D - 1)
        depth = depth_fraction(self.config, self.layer_idx)
        init.copy_(self.w0, -7 + 5 * channel ** (0.85 + math.sqrt(depth)) + 0.5)
        init.zeros_(self.a0)
        pairs = [(self.w1, self.w2), (self.a1, self.a2)]
        if not self.is_first_value_layer:
            init.ones_(self.v0)
            pairs.append((self.v1, self.v2))
        for first, second in pairs:
            init.zeros_(first)
            init.orthogonal_(second, gain=0.1)
        if not self.config.balance_state:
            init.constant_(self.k_k, 0.85)
            init.ones_(self.k_a)

    def mix(self, x: torch.Tensor, state: Any, v_first: torch.Tensor | None, shared: SharedInputs) -> Mixed:
        """See RecurrentMixer."""
        r, own_k, own_v = self.receptance_key_value(x, x, x, shared)
        k, v = repeat_heads(own_k, self.groups), repeat_heads(own_v, self.groups)
        a = self.heads(torch.sigmoid(self.a0 + (x @ self.a1) @ self.a2))
        decay = self.w0.float() + (torch.tanh(x @ self.w1) @ self.w2).float()
        log_w = self.heads(MIN_LOG_DECAY * torch.sigmoid(decay))
        if self.is_first_value_layer:
            v_first = v
        else:
            assert v_first is not None
            v = v + (v_first - v) * self.heads(torch.sigmoid(self.v0 + (x @ self.v1) @ self.v2))
        kappa, k = self._removal_and_key(k, a, log_w)
        mask = shared.token_mask
        written = zero_at_padding(log_w, mask), k, zero_at_padding(v, mask), kappa, zero_at_padding(a, mask)
        out, wkv = self.recur(rwkv7, (r, *written), state, shared)
        scale = 1.0 if self.config.groupnorm_att else self.head_dim**-0.5
        return Mixed(r, own_k, own_v, self.gate_heads(out * scale, x), RecurrentState(wkv), v_first)

    def _removal_and_key(self, k: torch.Tensor, a: torch.Tensor, log_w: torch.Tensor):
        """Unit removal keys kappa and the keys that are written, both [B, T, H, N]."""
        k = k.float()
        if self.config.balance_state:
            return F.normalize(k, dim=-1), k * (1 - log_w.exp() + a)
        k_k, k_a = self.heads(self.k_k.float()), self.heads(self.k_a.float())
        return F.normalize(k * k_k, dim=-1), k * (1 + (a - 1) * k_a)

    @classmethod
    def low_ranks(cls, config: "RadladsConfig", layer_idx: int) -> int:
        """See RecurrentMixer."""
        values = 0 if layer_idx == config.first_value_layer else config.lora_rank_value_residual_mix
        return super().low_ranks(config, layer_idx) + config.lora_rank_iclr + values

    @classmethod
    def kept_bytes(cls, config: "RadladsConfig", layer_idx: int, *, wide: bool) -> float:
        """See TimeMixer. What torch.compile's partitioner keeps, with the recurrence's own (chunked_passes)."""
        H, N, L = config.num_attention_heads, config.head_dim, BFLOAT16.chunk
        D, kept = H * N, super().kept_bytes(config, layer_idx, wide=wide)
        # r, a, v, k, kappa and the decay's low-rank product in bf16, log w in fp32, the norm of each head's removal key
        kept += 6 * 2 * D + 4 * D + 2 * (config.lora_rank_decay + config.lora_rank_iclr) + 4 * H
        kept += 2 * D if wide else 0  # a before and after it is rounded
        if layer_idx != config.first_value_layer:
            kept += 2 * D + 2 * config.num_key_value_heads * N + 2 * config.lora_rank_value_residual_mix
        # forward_keeping: u, two matrices of 2 L rows, mixes, the states met and the chunks' ends
        return kept + H * (2 * (5 * N + 2 * L + N * N / L) + 4 * N / L)

    @classmethod
    def backward_bytes(cls, config: "RadladsConfig", layer_idx: int) -> float:
        """See TimeMixer. d_out, dq and the states' gradients; gradients of r, k, v, kappa, a and, in fp32, of log w."""
        H, N = config.num_attention_heads, config.head_dim
        D = H * N
        gradients = 2 * D + 2 * H * (N + N * N / BFLOAT16.chunk) + 5 * 2 * D + 4 * D
        return gradients + cls.window_backward_bytes(config, layer_idx) - cls.freed_bytes(config)
