"""One decoding step of a RAD-RWKV7 stack in a few Triton kernels per layer. Import only where Triton is installed.

Owns the buffers between the kernels (decode_kernels.py) and their launches; sizes are in fused_launches.py. One row:
the norms are part of the products that read them. Several rows: products on the tensor cores, their sums over K split
among programs, and two norms per layer that gather the splits. Shape letters: B rows, C hidden size, F FFN size, D =
heads * head size.
"""

from typing import Any

import torch
import triton

from radlads.inference import decode_kernels as kernels
from radlads.inference.fused_launches import ONE_ROW, SEVERAL_ROWS, Launch, Launches
from radlads.inference.fused_states import FusedStates
from radlads.inference.packed_weights import PackedLayer, pack
from radlads.model.cache import RadladsCache
from radlads.model.layers import RMSNorm
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.rope import rope_inverse_frequencies
from radlads.model.swiglu import SwiGLU

# One row's kernels start while their predecessor still runs (programmatic dependent launch, Hopper and later); several
# rows' steps looked slower with it (docs/log.md)
PROGRAMMATIC_LAUNCH = True


class FusedStep:
    """Advances `rows` sequences by a token: tokens [rows] in, next logits [rows, V] fp32 out, states in place.

    wide: a step of as many rows or more, whose packed weights and first rows this one shares. Parameters may change
    between steps only in place; follow_weights then takes over the low ranks' first factors and the biases.
    """

    is_graphable = True

    def __init__(
        self,
        model: RadladsForCausalLM,
        rows: int,
        launches: Launches | None = None,
        *,
        wide: "FusedStep | None" = None,
    ):
        config, self.model, self.rows = model.config, model, rows
        self.layers: list[PackedLayer] = pack(model) if wide is None else wide.layers
        self.starts_early = PROGRAMMATIC_LAUNCH and rows == 1 and _can_start_early(model.device)
        self.launches = launches or (ONE_ROW if rows == 1 else SEVERAL_ROWS)
        self.padded_rows = 1 if rows == 1 else max(16, triton.next_power_of_2(rows))
        weight = model.model.embed_tokens.weight
        C, F = config.hidden_size, config.intermediate_size
        H, N = config.num_attention_heads, config.head_dim
        self.hidden, self.normed = weight.new_zeros(rows, C), weight.new_zeros(rows, C)
        self.projected = weight.new_zeros(rows, max(layer.inputs.shape[0] for layer in self.layers))
        self.first = weight.new_zeros(rows, self.layers[0].inputs.shape[0])  # its values are mixed into later ones
        self.heads_out, self.inner = weight.new_zeros(rows, H * N), weight.new_zeros(rows, F)
        fp32: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        splits = max(self.launches.output.splits, self.launches.down.splits)
        self.partial = torch.zeros(splits, rows, C, **fp32)
        self.low, self.raw = torch.zeros(4, rows, H * N, **fp32), torch.zeros(rows, H * N, **fp32)
        self.logits = torch.zeros(rows, config.vocab_size, **fp32)
        self.held: FusedStates = (
            FusedStates.empty(self.layers, rows, weight) if wide is None else wide.held.narrowed(rows)
        )
        self.states, self.windows = self.held.matrices, self.held.windows
        self.frequencies = torch.tensor(rope_inverse_frequencies(config), device=weight.device)

    def follow_weights(self) -> None:
        """See Step. What is packed stays at its place, so that a graph reads it there."""
        for held, packed in zip(self.layers, pack(self.model), strict=True):
            assert held.inputs.data_ptr() == packed.inputs.data_ptr(), "a parameter has another place now"
            held.bias.copy_(packed.bias)

    def load(self, cache: RadladsCache) -> None:
        """Continue from a cache of as many rows."""
        self.held.load(cache)

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """See RowStep."""
        self.held.put(row, cache, index)

    def move(self, source: int, target: int) -> None:
        """See RowStep."""
        self.held.move(source, target)

    def narrowed(self, rows: int) -> "FusedStep":
        """See RowStep."""
        return FusedStep(self.model, rows, wide=self)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after `tokens`, in a buffer that the next call overwrites."""
        torch.index_select(self.model.model.embed_tokens.weight, 0, tokens, out=self.hidden)
        angles = self.held.positions[:, None].float() * self.frequencies
        self.held.counters.add_(1)
        # Ordinary kernels after it, since a programmatic one reads `seen` before it waits (decode_kernels.py)
        cos, sin = angles.cos(), angles.sin()
        for number, layer in enumerate(self.layers):
            self._time_mixer(layer, number, cos, sin)
            self._channel_mixer(layer)
        head, norm = self.model.lm_head.weight, self.model.model.norm
        if self.rows == 1:
            self.project_one_row(self.launches.head, self.hidden, head, self.logits, norm=norm)
        else:
            self.add_and_norm(self.launches.down.splits, norm)
            self.project_rows(self.launches.head, self.normed, head, self.logits)
        return self.logits

    def _time_mixer(self, layer: PackedLayer, number: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        projected = self.first if number == 0 else self.projected
        norm, launch, output = layer.block.input_layernorm, self.launches.inputs, layer.mixer.o_proj.weight
        if self.rows == 1:
            self.project_one_row(launch, self.hidden, layer.inputs, projected, bias=layer.bias, norm=norm)
        else:
            self.add_and_norm(self.launches.down.splits if number else 0, norm)
            self.project_rows(launch, self.normed, layer.inputs, projected, bias=layer.bias)
        self.second_low_ranks(layer, projected)
        self.recurrence(layer, number, projected, cos, sin)
        if self.rows == 1:
            self.project_one_row(self.launches.output, self.heads_out, output, self.hidden, add=True)
        else:
            self.project_rows(self.launches.output, self.heads_out, output, self.partial)

    def _channel_mixer(self, layer: PackedLayer) -> None:
        norm, launch, mlp = layer.block.post_attention_layernorm, self.launches.gate_up, layer.block.mlp
        assert isinstance(mlp, SwiGLU)
        down = mlp.down_proj.weight
        if self.rows == 1:
            self.project_one_row(launch, self.hidden, layer.gate_up, self.inner, norm=norm, gated=True)
            self.project_one_row(self.launches.down, self.inner, down, self.hidden, add=True)
        else:
            self.add_and_norm(self.launches.output.splits, norm)
            self.project_rows(launch, self.normed, layer.gate_up, self.inner, gated=True)
            self.project_rows(self.launches.down, self.inner, down, self.partial)

    def project_one_row(
        self,
        launch: Launch,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        add: bool = False,
        gated: bool = False,
    ) -> None:
        total, K = weight.shape
        block_k = min(launch.block_k, triton.next_power_of_2(K))
        kernels.project_one_row[(triton.cdiv(total, launch.block_n),)](
            x,
            weight,
            bias,
            None if norm is None else norm.weight,
            out,
            0.0 if norm is None else norm.eps,
            N=total // 2 if gated else total,
            K=K,
            NORM=norm is not None,
            BIAS=bias is not None,
            ADD=add,
            GATED=gated,
            BLOCK_N=launch.block_n,
            BLOCK_K=block_k,
            num_warps=launch.warps,
            **self._programmatic(),
        )

    def project_rows(
        self,
        launch: Launch,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        gated: bool = False,
    ) -> None:
        total, K = weight.shape
        kernels.project_rows[(triton.cdiv(total, launch.block_n), launch.splits)](
            x,
            weight,
            bias,
            out,
            self.rows,
            N=total // 2 if gated else total,
            K=K,
            BIAS=bias is not None,
            GATED=gated,
            P=self.padded_rows,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            SPLITS=launch.splits,
            STAGES=launch.stages,
            num_warps=launch.warps,
            **self._programmatic(),
        )

    def add_and_norm(self, splits: int, norm: RMSNorm) -> None:
        C = self.hidden.shape[1]
        kernels.add_and_norm[(self.rows,)](
            self.hidden,
            self.partial,
            norm.weight,
            self.normed,
            norm.eps,
            self.rows,
            C=C,
            SPLITS=splits,
            BLOCK_C=triton.next_power_of_2(C),
            num_warps=8,
            **self._programmatic(),
        )

    def second_low_ranks(self, layer: PackedLayer, projected: torch.Tensor) -> None:
        mixer, D, block = layer.mixer, self.heads_out.shape[1], self.launches.low_rank_columns
        mixes_values, has_low_gate = not mixer.is_first_value_layer, mixer.config.gate_rank_type == 2
        kernels.second_low_ranks[(triton.cdiv(D, block), 4 if has_low_gate else 3)](
            projected[:, layer.low_offset :],
            mixer.w2,
            mixer.a2,
            mixer.v2 if mixes_values else None,
            mixer.g2 if has_low_gate else None,
            mixer.w0,
            mixer.a0,
            mixer.v0 if mixes_values else None,
            self.low,
            self.rows,
            D=D,
            STRIDE=projected.shape[1],
            RANK_W=layer.ranks[0],
            RANK_A=layer.ranks[1],
            RANK_V=layer.ranks[2],
            RANK_G=layer.ranks[3],
            P=self.padded_rows,
            BLOCK_D=block,
            num_warps=4,
            **self._programmatic(),
        )

    def recurrence(
        self, layer: PackedLayer, number: int, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        mixer, config = layer.mixer, layer.mixer.config
        has_norm, scales = config.groupnorm_att, not config.balance_state
        window, held = mixer.window, self.windows[number] or (None, None, None)
        kernels.recurrence[(mixer.num_heads, self.rows)](
            projected,
            self.first,
            self.low,
            mixer.k_k if scales else None,
            mixer.k_a if scales else None,
            mixer.ln_x.weight if has_norm else None,
            mixer.ln_x.bias if has_norm else None,
            cos,
            sin,
            self.states[number],
            self.raw,
            self.heads_out,
            *held,
            mixer.window_scale if window else None,
            mixer.recurrent_scale if window else None,
            self.rows,
            mixer.ln_x.eps if has_norm else 0.0,
            H=mixer.num_heads,
            GROUPS=mixer.groups,
            N=mixer.head_dim,
            STRIDE=projected.shape[1],
            FIRST_STRIDE=self.first.shape[1],
            GATE_OFFSET=layer.gate_offset,
            ROPE=config.use_rope,
            MIX_VALUES=not mixer.is_first_value_layer,
            BALANCED=config.balance_state,
            GROUP_NORM=has_norm,
            GATE=config.gate_rank_type,
            BLOCK_V=min(self.launches.state_values, mixer.head_dim),
            STAGES=3,
            WINDOW=window.window_tokens if window else 0,
            SINKS=window.sink_tokens if window else 0,
            BLOCK_S=min(self.launches.window_slots, triton.next_power_of_2(window.held_tokens)) if window else 0,
            SLOT_STAGES=self.launches.slot_stages,
            num_warps=self.launches.state_warps,
            **self._programmatic(),
        )

    def _programmatic(self) -> dict[str, bool]:
        """PDL compiles a kernel for it, launch_pdl (an option of Triton's CUDA back end alone) launches it so."""
        return {"PDL": True, "launch_pdl": True} if self.starts_early else {"PDL": False}


def _can_start_early(device: torch.device) -> bool:
    """Whether the device knows programmatic launches: a GPU of compute capability 9.0 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
