"""What RAD-RWKV6 and RAD-RWKV7 have in common: the teacher's four projections and norms, the gate, the output norm.

A variant that adds something beside the recurrence is a small subclass: see RecurrentMixer.finish.

Shape letters: B batch, T tokens, C hidden size, D = H * N, H heads, N head size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .contracts import RecurrentState, SharedInputs, WindowedState
from .layers import HeadNorm, RMSNorm, apply_rope
from .rope import rope_attention_factor
from .state_slots import Kind, run_in_slots, step_in_slots
from .time_mixer import MixerWeights, StateTensor, TimeMixer, Use
from .window import (
    OBSTACLES,
    HeldWindow,
    WindowSettings,
    backward_bytes,
    held_tensors,
    kept_bytes,
    window_of,
)
from .window_attention import window_attention

if TYPE_CHECKING:
    from .configuration import RadladsConfig


class Mixed(NamedTuple):
    """A recurrent mixer's tensors between its recurrence and its output projection.

    r [B, T, H, N], k and v [B, T, key/value heads, N]: the projections as the teacher's attention reads them, normed
    (qk_norm) and rotated (use_rope), before any change for the recurrence.
    gated [B, T, D]: the recurrence's output, normed and gated. state: after the last token.
    v_first [B, T, H, N]: for the next layer.
    """

    r: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gated: torch.Tensor
    state: RecurrentState
    v_first: torch.Tensor | None


class RecurrentMixer(TimeMixer):
    """Base of the recurrent time mixers. A subclass defines `mix`, the recurrence; `reset_fresh_parameters` sets what
    the teacher does not provide so that the mixer starts (almost) without effect.

    kind: the recurrence's name in state_slots.
    state_flops: FLOPs per token, head and element of the [N, N] state.
    window: of softmax attention beside the recurrence (docs/windows.md); None: none.
    """

    Settings: ClassVar[type] = WindowSettings
    kind: ClassVar[Kind]
    state_flops: ClassVar[int]

    def __init__(self, config: "RadladsConfig", layer_idx: int):
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
        self.window = window_of(config, layer_idx)
        if self.window is not None:
            self.window_scale = nn.Parameter(torch.empty(D))
            self.recurrent_scale = nn.Parameter(torch.empty(D))

    def reset_fresh_parameters(self) -> None:
        """Set the gate, the output norm and the window's scales to their initial values; the projections come from the
        teacher.

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
        if self.window is not None:
            init.ones_(self.window_scale)
            init.ones_(self.recurrent_scale)

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
        """Receptance [B, T, H, N], key and value [B, T, key/value heads, N]: projected, normed (qk_norm) and rotated
        (use_rope). `repeat_heads(x, self.groups)` gives every query head its own."""
        r, k, v = self.heads(self.q_proj(x_r)), self.heads(self.k_proj(x_k)), self.heads(self.v_proj(x_v))
        if self.q_norm is not None and self.k_norm is not None:
            r, k = self.q_norm(r), self.k_norm(k)
        if self.config.use_rope:
            r = apply_rope(r, shared.cos, shared.sin, self.rope_factor)
            k = apply_rope(k, shared.cos, shared.sin, self.rope_factor)
        return r, k, v

    def forward(self, x: torch.Tensor, state: Any, v_first: torch.Tensor | None, shared: SharedInputs):
        """See TimeMixer.forward."""
        mixed = self.mix(x, state, v_first, shared)
        heads_BTD, state = self.finish(mixed, state, shared)
        return self.o_proj(heads_BTD), state, mixed.v_first

    def mix(self, x: torch.Tensor, state: Any, v_first: torch.Tensor | None, shared: SharedInputs) -> Mixed:
        """Project, run the recurrence, norm and gate."""
        raise NotImplementedError

    def recur(self, recurrence: Callable, tensors: tuple[torch.Tensor, ...], state: Any, shared: SharedInputs):
        """recurrence(*tensors, the state's matrices): outputs [B, T, H, N], and the matrices after the last token; None
        if they lie in shared.slots."""
        if shared.slots is None:
            packed = {} if shared.texts is None else {"texts": shared.texts}
            return recurrence(*tensors, None if state is None else state.wkv, **packed)
        if shared.sequences is None:
            return step_in_slots(self.kind, [x[:, 0] for x in tensors], shared.slots)[:, None], None
        return run_in_slots(self.kind, [x[0] for x in tensors], shared.sequences, shared.slots)[None], None

    def finish(self, mixed: Mixed, state: Any, shared: SharedInputs) -> tuple[torch.Tensor, Any]:
        """What the output projection reads, [B, T, D], and the state to carry. `state`: that before these tokens.

        With a window, c_s * soft + c_r * gated and a WindowedState. The seam for a variant: another summand is added
        here, and what it carries is added to the state, of which `state_tensors` then tells. A variant with Settings of
        its own has no window, unless they extend WindowSettings; then its finish calls this one.
        """
        if self.window is None:
            return mixed.gated, mixed.state
        q, k = self._as_teacher_rotates(mixed, shared)
        held = None if state is None else HeldWindow(state.keys, state.values, state.seen)
        soft, held = window_attention(
            q, k, mixed.v, held, self.window, token_mask=shared.token_mask, texts=shared.texts
        )
        summed = self.window_scale * soft.flatten(2) + self.recurrent_scale * mixed.gated
        return summed.to(mixed.gated.dtype), WindowedState(*mixed.state, *held)

    def _as_teacher_rotates(self, mixed: Mixed, shared: SharedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The window's queries and keys. It is the teacher's attention, so use_rope, the recurrence's, is not asked."""
        if self.config.use_rope:
            return mixed.r, mixed.k
        r, k = (apply_rope(x, shared.cos, shared.sin, self.rope_factor) for x in (mixed.r, mixed.k))
        return r, k

    def gate_heads(self, o_BTHN: torch.Tensor, x_g: torch.Tensor) -> torch.Tensor:
        """Norm the heads' outputs (groupnorm_att) and gate them from x_g [B, T, C] (gate_rank_type): [B, T, D]."""
        o_BTD = o_BTHN.flatten(2)
        if self.config.groupnorm_att:
            o_BTD = self.ln_x(o_BTD)
        if self.config.gate_rank_type == 1:
            o_BTD = o_BTD * torch.sigmoid(self.gate(x_g))
        elif self.config.gate_rank_type == 2:
            o_BTD = o_BTD * (torch.sigmoid(x_g @ self.g1) @ self.g2)
        return o_BTD

    # What the mixer says about itself (TimeMixer); C hidden size, D = H * N

    @classmethod
    def obstacle_in(cls, config: "RadladsConfig", layer_idx: int, use: Use) -> str | None:
        """See TimeMixer."""
        why = cls.obstacle(use)
        return OBSTACLES.get(use) if why is None and window_of(config, layer_idx) is not None else why

    @classmethod
    def state_tensors(cls, config: "RadladsConfig", layer_idx: int) -> dict[str, StateTensor]:
        """See TimeMixer."""
        size, window = config.head_dim, window_of(config, layer_idx)
        recurrent = {"wkv": StateTensor((config.num_attention_heads, size, size), torch.float32)}
        return recurrent if window is None else recurrent | held_tensors(config, window)

    @classmethod
    def low_ranks(cls, config: "RadladsConfig", layer_idx: int) -> int:
        """The ranks of all pairs of low-rank factors between C and D, added up."""
        return config.lora_rank_decay + (config.lora_rank_gate if config.gate_rank_type == 2 else 0)

    @classmethod
    def product_weights(cls, config: "RadladsConfig", layer_idx: int) -> MixerWeights:
        """See TimeMixer."""
        C, D = config.hidden_size, config.num_attention_heads * config.head_dim
        D_kv, ranks = config.num_key_value_heads * config.head_dim, cls.low_ranks(config, layer_idx)
        full_gate = C * D if config.gate_rank_type == 1 else 0
        return MixerWeights(C * (D + 2 * D_kv) + full_gate + C * ranks, D * C + D * ranks)

    @classmethod
    def mixing_flops(cls, config: "RadladsConfig", layer_idx: int, context_tokens: float) -> float:
        """See TimeMixer. The recurrence's, which the context does not change, and the window's."""
        D, window = config.num_attention_heads * config.head_dim, window_of(config, layer_idx)
        read = 0.0 if window is None else min(context_tokens, window.held_tokens)
        return cls.state_flops * D * config.head_dim + 4 * D * read

    @classmethod
    def kept_bytes(cls, config: "RadladsConfig", layer_idx: int, *, wide: bool) -> float:
        """See TimeMixer. Of what is kept outside the recurrence and its inputs; a subclass adds those."""
        C, D = config.hidden_size, config.num_attention_heads * config.head_dim
        # k before it is repeated over groups, the output, and what the output projection reads
        kept: float = 2 * C + 2 * config.num_key_value_heads * config.head_dim + 2 * D
        if config.gate_rank_type:
            kept += 2 * D + 2 * D + (2 * config.lora_rank_gate if config.gate_rank_type == 2 else 0)
        if config.groupnorm_att:
            kept += 8 * config.num_attention_heads
        window = window_of(config, layer_idx)
        return kept if window is None else kept + kept_bytes(config, window)

    @classmethod
    def window_backward_bytes(cls, config: "RadladsConfig", layer_idx: int) -> float:
        """Bytes per token that a window adds to backward_bytes."""
        window = window_of(config, layer_idx)
        return 0.0 if window is None else backward_bytes(config, window)

    @classmethod
    def freed_bytes(cls, config: "RadladsConfig") -> float:
        """Bytes per token of what is kept outside the recurrence, and free when its backward pass begins."""
        return 2 * config.num_attention_heads * config.head_dim * (3 if config.gate_rank_type else 1)


def zero_at_padding(x_BTHN: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """x where token_mask [B, T] is True, 0 elsewhere."""
    return x_BTHN if token_mask is None else x_BTHN * token_mask[:, :, None, None].to(x_BTHN.dtype)
