"""What RAD-RWKV6 and RAD-RWKV7 have in common: the teacher's four projections and norms, the gate, the output norm.

Shape letters: B batch, T tokens, C hidden size, D = H * N, H heads, N head size.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration import RadladsConfig, rope_attention_factor
from .contracts import SharedInputs
from .layers import HeadNorm, RMSNorm, apply_rope, repeat_heads


class RecurrentMixer(nn.Module):
    """Base of the recurrent time mixers. Subclasses add the recurrence; `reset_fresh_parameters` sets what the
    teacher does not provide so that the mixer starts (almost) without effect."""

    def __init__(self, config: RadladsConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.rope_factor = rope_attention_factor(config)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        C, D, D_kv = config.hidden_size, self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(C, D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, D_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, D_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(D, C, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        if config.gate_rank_type == 1:
            self.gate = nn.Linear(C, D, bias=False)
        elif config.gate_rank_type == 2:
            self.g1 = nn.Parameter(torch.empty(C, config.lora_rank_gate))
            self.g2 = nn.Parameter(torch.empty(config.lora_rank_gate, D))
        if config.groupnorm_att:
            self.ln_x = HeadNorm(self.num_heads, D, eps=self.head_dim * 1e-5)

    def reset_fresh_parameters(self) -> None:
        """Set the gate and the output norm to their initial values; the projections come from the teacher.

        Through transformers' initialisers, which leave a tensor alone that was read from a checkpoint.
        """
        if self.config.gate_rank_type == 1:
            init.zeros_(self.gate.weight)
        elif self.config.gate_rank_type == 2:
            init.zeros_(self.g1)
            init.orthogonal_(self.g2, gain=0.1)
        if self.config.groupnorm_att:
            init.ones_(self.ln_x.weight)
            init.zeros_(self.ln_x.bias)

    def reset_projections(self) -> None:
        """Set the projections anew for a student without its teacher's (reinit_att), as in the released code: queries,
        keys and values uniform in (-1, 1) C^-1/2 / 2, biases and the output projection 0."""
        bound = 0.5 * self.config.hidden_size**-0.5
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                init.zeros_(projection.bias)
        init.zeros_(self.o_proj.weight)

    def heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * N] as [B, T, heads, N]."""
        return x_BTD.unflatten(-1, (-1, self.head_dim))

    def receptance_key_value(self, x_r, x_k, x_v, shared: SharedInputs):
        """Receptance, key and value [B, T, H, N]: projected, normed (qk_norm), rotated (use_rope) and repeated
        over GQA groups."""
        r, k, v = self.heads(self.q_proj(x_r)), self.heads(self.k_proj(x_k)), self.heads(self.v_proj(x_v))
        if self.q_norm is not None and self.k_norm is not None:
            r, k = self.q_norm(r), self.k_norm(k)
        if self.config.use_rope:
            r = apply_rope(r, shared.cos, shared.sin, self.rope_factor)
            k = apply_rope(k, shared.cos, shared.sin, self.rope_factor)
        return r, repeat_heads(k, self.groups), repeat_heads(v, self.groups)

    def output(self, o_BTHN: torch.Tensor, x_g: torch.Tensor) -> torch.Tensor:
        """Norm (groupnorm_att), gate from x_g [B, T, C] (gate_rank_type) and project the heads' outputs."""
        o_BTD = o_BTHN.flatten(2)
        if self.config.groupnorm_att:
            o_BTD = self.ln_x(o_BTD)
        if self.config.gate_rank_type == 1:
            o_BTD = o_BTD * torch.sigmoid(self.gate(x_g))
        elif self.config.gate_rank_type == 2:
            o_BTD = o_BTD * (torch.sigmoid(x_g @ self.g1) @ self.g2)
        return self.o_proj(o_BTD)


def zero_at_padding(x_BTHN: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """x where token_mask [B, T] is True, 0 elsewhere."""
    return x_BTHN if token_mask is None else x_BTHN * token_mask[:, :, None, None].to(x_BTHN.dtype)
