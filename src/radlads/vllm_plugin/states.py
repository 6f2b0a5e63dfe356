"""The states of recurrent layers in vLLM's cache, and a step of a recurrent layer as a custom operator.

vLLM gives every sequence a slot in each layer: one tensor of bytes, in which the tensors of TimeMixer.state_tensors
lie one after another. So a stack may mix mixers, and all layers have slots of one size.
Shape letters: T tokens of a step (decodes first, one token each, then prefills), S slots, C hidden size, H heads of
this process, N head size.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionBackend, ShortConvAttentionMetadataBuilder

from radlads.model.configuration import RadladsConfig
from radlads.model.contracts import RecurrentState, SharedInputs, WindowedState
from radlads.model.recurrent_mixer import RecurrentMixer
from radlads.vllm_plugin.register import OPERATOR

_ALIGNMENT = 16  # bytes, for wide loads


class Place(NamedTuple):
    """Where a tensor lies in a slot: from byte `start` on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def places_of(config: RadladsConfig, layer_idx: int, dtype: torch.dtype) -> dict[str, Place]:
    """The tensors of a layer's state by name. dtype: what the model computes in."""
    places: dict[str, Place] = {}
    end = 0
    for name, tensor in config.mixer_class(layer_idx).state_tensors(config, layer_idx).items():
        places[name] = Place(_aligned(end), tensor.shape, tensor.dtype or dtype)
        end = places[name].end
    return places


def slot_bytes(config: RadladsConfig, dtype: torch.dtype) -> int:
    """Bytes of a slot: those of the largest state of any layer. config: of this process's share."""
    layers = [places_of(config, layer, dtype) for layer in config.recurrent_layers]
    return max((_aligned(place.end) for places in layers for place in places.values()), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class StateMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """vLLM's split of a step into decodes and prefills. No whole CUDA graphs: a step reads lengths on the host."""

    _cudagraph_support = AttentionCGSupport.NEVER
    needs_causal_conv1d_metadata = False


class StateBackend(ShortConvAttentionBackend):
    """What vLLM asks how the slots of a step are to be found."""

    @staticmethod
    def get_name() -> str:
        return "RADLADS_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder


class StateSlots(MambaBase):
    """The slots of one recurrent layer, and its mixer's steps on them. vLLM finds it by the layer's name.

    first_values: whether an earlier layer has made the values that this one mixes in.
    """

    def __init__(self, mixer: RecurrentMixer, places: dict[str, Place], num_bytes: int, *, first_values: bool):
        self.mixer, self.places, self.num_bytes, self.first_values = mixer, places, num_bytes, first_values
        self.kv_cache = (torch.empty(0, num_bytes, dtype=torch.uint8),)

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return ((self.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def step(
        self, x: torch.Tensor, shared: SharedInputs, v_first: torch.Tensor, mixed: torch.Tensor, metadata: Any
    ) -> None:
        """Fill mixed [T, H * N], what the output projection reads, and v_first [T, H, N] if this layer makes it.

        metadata: vLLM's; None while it measures memory, when all tokens count as one prompt and no state is kept.
        """
        if metadata is None:
            self._mix(x[None], None, shared, v_first[None], mixed[None])
            return
        num_decodes = metadata.num_decodes
        if num_decodes:
            tokens, slots = slice(0, num_decodes), metadata.state_indices_tensor_d[:num_decodes, 0]
            tables = SharedInputs(shared.cos[0, tokens, None], shared.sin[0, tokens, None])
            after = self._mix(x[tokens, None], self._load(slots), tables, v_first[tokens, None], mixed[tokens, None])
            self._save(slots, after)
        if metadata.num_prefills:
            ends = metadata.query_start_loc_p.tolist()
            rows = zip(metadata.state_indices_tensor_p.tolist(), metadata.has_initial_states_p.tolist(), strict=True)
            for row, (slot, has_state) in enumerate(rows):
                tokens = slice(num_decodes + ends[row], num_decodes + ends[row + 1])
                tables = SharedInputs(shared.cos[:, tokens], shared.sin[:, tokens])
                # A slot is not cleared for a new sequence
                state = self._load([slot]) if has_state else None
                after = self._mix(x[None, tokens], state, tables, v_first[None, tokens], mixed[None, tokens])
                self._save([slot], after)

    def _mix(
        self, x: torch.Tensor, state: Any, shared: SharedInputs, v_first: torch.Tensor, mixed: torch.Tensor
    ) -> Any:
        """Run the mixer up to its output projection on x [B, T, C]; the state after it."""
        found = self.mixer.mix(x, state, v_first if self.first_values else None, shared)
        heads, state = self.mixer.finish(found, state, shared)
        mixed.copy_(heads)
        if not self.first_values and found.v_first is not None:
            v_first.copy_(found.v_first)
        return state

    def _held(self) -> dict[str, torch.Tensor]:
        """All slots of each tensor of the state, [S, ...]: views of vLLM's bytes."""
        (held,) = self.kv_cache
        return {
            name: held[:, place.start : place.end].view(place.dtype).unflatten(1, place.shape or (1,))
            for name, place in self.places.items()
        }

    def _load(self, slots: torch.Tensor | list[int]) -> Any:
        """The state of these slots, as the mixer takes it."""
        held = self._held()
        kind: Any = WindowedState if "keys" in held else RecurrentState
        found = {name: each[slots].view(-1, *self.places[name].shape) for name, each in held.items()}
        return kind(*(found.get(name) for name in kind._fields))

    def _save(self, slots: torch.Tensor | list[int], state: Any) -> None:
        for name, held in self._held().items():
            held[slots] = getattr(state, name).to(held.dtype).view(-1, *held.shape[1:])


def mix_step(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, v_first: torch.Tensor, mixed: torch.Tensor, layer_name: str
) -> None:
    """StateSlots.step of the layer of this name, as torch.compile can hold it. cos, sin: [T, N]."""
    context = get_forward_context()
    layer, metadata = context.no_compile_layers[layer_name], context.attn_metadata
    layer.step(
        x, SharedInputs(cos[None], sin[None]), v_first, mixed, None if metadata is None else metadata[layer_name]
    )


def _mix_step_on_meta(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, v_first: torch.Tensor, mixed: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(OPERATOR, mix_step, mutates_args=["v_first", "mixed"], fake_impl=_mix_step_on_meta)
