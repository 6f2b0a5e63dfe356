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
from radlads.model.sequences import Sequences, Slots, sequences_of
from radlads.vllm_plugin.register import OPERATOR

_ALIGNMENT = 16  # bytes, for wide loads
_SEQUENCES = "radlads_sequences"  # an attribute that we add to vLLM's metadata of a step


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
            tokens, at = slice(0, num_decodes), metadata.state_indices_tensor_d[:num_decodes, 0]
            own = SharedInputs(shared.cos[0, tokens, None], shared.sin[0, tokens, None], slots=self._slots(at, at))
            self._mix_in_slots(x[tokens, None], at, None, own, v_first[tokens, None], mixed[tokens, None])
        if metadata.num_prefills:
            prefill = self._prefill_one_by_one if "keys" in self.places else self._prefill
            prefill(x, shared, v_first, mixed, metadata)

    def _prefill(
        self, x: torch.Tensor, shared: SharedInputs, v_first: torch.Tensor, mixed: torch.Tensor, metadata: Any
    ) -> None:
        """Read all prompts of a step together."""
        tokens = slice(metadata.num_decodes, metadata.num_decodes + metadata.num_prefill_tokens)
        at, has_state = metadata.state_indices_tensor_p, metadata.has_initial_states_p
        own = SharedInputs(
            shared.cos[:, tokens],
            shared.sin[:, tokens],
            slots=self._slots(torch.where(has_state, at, -1), at),  # a slot is not cleared for a new sequence
            sequences=_sequences_of(metadata),
        )
        self._mix_in_slots(x[None, tokens], at, has_state, own, v_first[None, tokens], mixed[None, tokens])

    def _prefill_one_by_one(
        self, x: torch.Tensor, shared: SharedInputs, v_first: torch.Tensor, mixed: torch.Tensor, metadata: Any
    ) -> None:
        """Read a step's prompts one after the other: windows know nothing of rows that hold several."""
        at, has_state = metadata.state_indices_tensor_p, metadata.has_initial_states_p
        begin = metadata.num_decodes
        for row, length in enumerate(_sequences_of(metadata).lengths):
            tokens, own_at = slice(begin, begin + length), at[row : row + 1]
            state = self._load(own_at, has_state[row : row + 1])
            tables = SharedInputs(shared.cos[:, tokens], shared.sin[:, tokens])
            self._save(own_at, self._mix(x[None, tokens], state, tables, v_first[None, tokens], mixed[None, tokens]))
            begin += length

    def _mix_in_slots(
        self,
        x: torch.Tensor,
        at: torch.Tensor,
        has_state: torch.Tensor | None,
        shared: SharedInputs,
        v_first: torch.Tensor,
        mixed: torch.Tensor,
    ) -> None:
        """Run the mixer on sequences whose matrices it finds in shared.slots; what else a state has is copied."""
        others = [name for name in self.places if name != "wkv"]
        after = self._mix(x, self._load(at, has_state, others), shared, v_first, mixed)
        self._save(at, after, others)

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

    def _slots(self, first: torch.Tensor, last: torch.Tensor) -> Slots:
        """Where the matrices of sequences lie that begin and end in these slots."""
        return Slots(self._held()["wkv"], first, last)

    def _load(self, at: torch.Tensor, has_state: torch.Tensor | None, names: Iterable[str] | None = None) -> Any:
        """The state in these slots as the mixer takes it, or some of its tensors; zeros where there is none yet."""
        kind: Any = WindowedState if "keys" in self.places else RecurrentState
        held, found = self._held(), {}
        for name in self.places if names is None else names:
            rows = held[name][at.clamp(min=0)].view(-1, *self.places[name].shape)
            absent = None if has_state is None else ~has_state.view(-1, *[1] * (rows.ndim - 1))
            found[name] = rows if absent is None else rows.masked_fill(absent, 0)
        return kind(*(found.get(name) for name in kind._fields))

    def _save(self, at: torch.Tensor, state: Any, names: Iterable[str] | None = None) -> None:
        held = self._held()
        for name in self.places if names is None else names:
            # Padded rows of a CUDA graph have slot -1, or 0, which is nobody's
            held[name][at.clamp(min=0)] = getattr(state, name).to(held[name].dtype).view(-1, *held[name].shape[1:])


def _sequences_of(metadata: Any) -> Sequences:
    """A step's prompts, the same in all layers: their lengths are read from the device by the first."""
    known = getattr(metadata, _SEQUENCES, None)
    if known is None:
        ends = metadata.query_start_loc_p
        known = sequences_of(ends.diff().tolist(), ends.device)
        setattr(metadata, _SEQUENCES, known)
    return known


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
