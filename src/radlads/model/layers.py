"""Small pieces that several mixers share: norms, RoPE, GQA repetition, token shift.

Shape letters: B batch, T tokens, C hidden size, H heads, N head size.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .rope import rope_inverse_frequencies

if TYPE_CHECKING:
    from .configuration import RadladsConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32.

    Under autocast the result is in autocast's dtype: all its readers are matrix products, and one cast serves them all.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(dtype)


class HeadNorm(nn.GroupNorm):
    """GroupNorm of each token's heads by themselves, [B, T, D] to the same shape and dtype, computed in fp32."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.group_norm(x_BTD.flatten(0, 1).float(), self.num_groups, weight, bias, self.eps)
        return normed.view_as(x_BTD).to(x_BTD.dtype)


def rope_tables(config: "RadladsConfig", position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [B, T, N], for positions [B, T]; yarn's factor is apply_rope's."""
    frequencies = torch.tensor(rope_inverse_frequencies(config), device=position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BTHN: torch.Tensor, cos_BTN: torch.Tensor, sin_BTN: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Rotate each head's channel pairs (n, n + N/2) by the position's angle; multiply by rope_attention_factor()."""
    first, second = x_BTHN.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    turned = x_BTHN * cos_BTN.unsqueeze(2) + rotated * sin_BTN.unsqueeze(2)
    return (turned if factor == 1.0 else turned * factor).to(x_BTHN.dtype)


def depth_fraction(config: "RadladsConfig", layer_idx: int) -> float:
    """0 at the first layer, 1 at the last; initial decays depend on it."""
    return layer_idx / max(1, config.num_hidden_layers - 1)


def repeat_heads(x_BTHN: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat every key/value head `groups` times in a row, so that heads match the query heads (GQA)."""
    return x_BTHN if groups == 1 else x_BTHN.repeat_interleave(groups, dim=2)


def token_shift(x: torch.Tensor, last: torch.Tensor | None, token_mask: torch.Tensor | None):
    """The input of the token before each of x [B, T, C], and the input to carry on, [B, C].

    `last` is the input carried from earlier tokens (None: zero). Padded positions are looked through.
    """
    last = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    history = torch.cat([last.unsqueeze(1), x], dim=1)
    if token_mask is None:
        return history[:, :-1], x[:, -1]
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    newest = torch.where(token_mask, steps, 0).cummax(dim=1).values
    newest = F.pad(newest, (1, 0))  # index into history of the newest real token up to each position
    looked_up = history.gather(1, newest.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return looked_up[:, :-1], looked_up[:, -1]
