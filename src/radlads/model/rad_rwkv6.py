"""RAD-RWKV6: gated linear attention with data-dependent decay and token shift, without a bonus.

Shape letters: B batch, T tokens, C hidden size, D = H * N, H heads, N head size.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from .contracts import RecurrentState, SharedInputs
from .gla_triton import BFLOAT16
from .layers import depth_fraction, repeat_heads, token_shift
from .recurrence import gla
from .recurrent_mixer import Mixed, RecurrentMixer, zero_at_padding
from .time_mixer import MixerWeights, StateTensor

if TYPE_CHECKING:
    from .configuration import RadladsConfig

MIN_LOG_DECAY = -5.0
SHIFTED = ("r", "k", "v", "w", "g")  # the order of time_maa_w2's slices


class RadRwkv6(RecurrentMixer):
    """RAD-RWKV6 time mixer (paper eq. 12-21)."""

    title = "RAD-RWKV6"
    variants: ClassVar = {"balanced": {"balance_state": 1, "groupnorm_att": 0}}
    decay_and_shift = ("time_decay*", "time_maa_*")
    kind = "gla"
    state_flops = 5  # decay 1, write 2, read 2
    made_for: ClassVar = frozenset({"llama.cpp", "vLLM", "published format", "CUDA graph", "packed rows"})
    obstacles: ClassVar = {"fused decode": "there are no fused kernels for RAD-RWKV6"}

    def __init__(self, config: "RadladsConfig", layer_idx: int):
        super().__init__(config, layer_idx)
        C, D, rank = config.hidden_size, self.num_heads * self.head_dim, config.lora_rank_tokenshift
        if config.use_tokenshift:
            self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
            for name in SHIFTED:
                setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
            self.time_maa_w1 = nn.Parameter(torch.empty(C, len(SHIFTED) * rank))
            self.time_maa_w2 = nn.Parameter(torch.empty(len(SHIFTED), rank, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, D))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.lora_rank_decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.lora_rank_decay, D))
        self.reset_fresh_parameters()

    def reset_fresh_parameters(self) -> None:
        super().reset_fresh_parameters()
        D = self.num_heads * self.head_dim
        channel = torch.arange(D) / max(1, D - 1)
        depth = depth_fraction(self.config, self.layer_idx)
        init.copy_(self.time_decay, -6 + 5 * channel ** (0.7 + 1.3 * depth))
        init.zeros_(self.time_decay_w1)
        init.uniform_(self.time_decay_w2, -0.01, 0.01)
        if self.config.use_tokenshift:
            init.ones_(self.time_maa_x)
            for name in SHIFTED:
                init.zeros_(getattr(self, f"time_maa_{name}"))
            init.zeros_(self.time_maa_w1)
            init.uniform_(self.time_maa_w2, -0.01, 0.01)

    def mix(self, x: torch.Tensor, state: Any, v_first: torch.Tensor | None, shared: SharedInputs) -> Mixed:
        """See RecurrentMixer."""
        last = None if state is None else state.shift
        (x_r, x_k, x_v, x_w, x_g), shift = self._mix_with_previous(x, last, shared)
        r, own_k, own_v = self.receptance_key_value(x_r, x_k, x_v, shared)
        k, v = repeat_heads(own_k, self.groups), repeat_heads(own_v, self.groups)
        decay = self.time_decay.float() + (torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2).float()
        log_w = self.heads(torch.clamp(-torch.exp(decay), min=MIN_LOG_DECAY))
        if self.config.balance_state:
            k = k.float() * (1 - log_w.exp())
        written = zero_at_padding(log_w, shared.token_mask), k, zero_at_padding(v, shared.token_mask)
        out, wkv = self.recur(gla, (r, *written), state, shared)
        gated = self.gate_heads(out * self.head_dim**-0.5, x_g)
        return Mixed(r, own_k, own_v, gated, RecurrentState(wkv, shift), v_first)

    def _mix_with_previous(self, x, last, shared: SharedInputs):
        """x mixed with the token before, once for each of r, k, v, w, g; and the input to carry."""
        if not self.config.use_tokenshift:
            return [x] * len(SHIFTED), None
        if shared.sequences is None:
            previous, shift = token_shift(x, last, shared.token_mask)
        else:
            previous, shift = shared.sequences.tokens_before(x, last)
        if shared.texts is not None:
            previous = previous.masked_fill(shared.texts.starts.unsqueeze(-1), 0.0)
        delta = previous - x
        low = torch.tanh((x + delta * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (len(SHIFTED), -1))
        mixes = torch.einsum("btir,irc->ibtc", low, self.time_maa_w2.to(low.dtype))
        return [
            x + delta * (getattr(self, f"time_maa_{name}") + mix) for name, mix in zip(SHIFTED, mixes, strict=True)
        ], shift

    @classmethod
    def state_tensors(cls, config: "RadladsConfig", layer_idx: int) -> dict[str, StateTensor]:
        """See TimeMixer."""
        shift = {"shift": StateTensor((config.hidden_size,))} if config.use_tokenshift else {}
        return super().state_tensors(config, layer_idx) | shift

    @classmethod
    def product_weights(cls, config: "RadladsConfig", layer_idx: int) -> MixerWeights:
        """See TimeMixer. With token shift every product has a trained mix of tokens before it."""
        found = super().product_weights(config, layer_idx)
        if not config.use_tokenshift:
            return found
        mixes = 2 * len(SHIFTED) * config.hidden_size * config.lora_rank_tokenshift
        return MixerWeights(0, found.at_input + found.inside + mixes)

    @classmethod
    def kept_bytes(cls, config: "RadladsConfig", layer_idx: int, *, wide: bool) -> float:
        """See TimeMixer. With the recurrence's own (chunked_passes.Chunks.forward_keeping)."""
        C, H, N, L = config.hidden_size, config.num_attention_heads, config.head_dim, BFLOAT16.chunk
        # r, k, v and the decay's low-rank product in bf16, log w in fp32
        kept = super().kept_bytes(config, layer_idx, wide=wide) + (4 * 2 + 4) * H * N + 2 * config.lora_rank_decay
        if config.use_tokenshift:
            # The step from the token before, and five mixes of both with the shares that made them
            kept += 2 * C + len(SHIFTED) * (2 * C + 2 * C + 2 * config.lora_rank_tokenshift)
        # forward_keeping: two matrices of L rows, mixes, the states met and the chunks' ends
        return kept + H * (2 * (2 * N + L + N * N / L) + 4 * N / L)

    @classmethod
    def backward_bytes(cls, config: "RadladsConfig", layer_idx: int) -> float:
        """See TimeMixer. d_out and the states' gradients; gradients of r, k, v and, in fp32, of log w."""
        H, N = config.num_attention_heads, config.head_dim
        gradients = H * (2 * N + 2 * N * N / BFLOAT16.chunk + 3 * 2 * N + 4 * N)
        return gradients + cls.window_backward_bytes(config, layer_idx) - cls.freed_bytes(config)
