"""The model as vLLM builds it: radlads' mixers and norms, vLLM's linear layers, attention, embedding and head.

Shape letters: T tokens of a step, C hidden size, V vocabulary, H heads of this process, N head size.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from radlads.model.configuration import RadladsConfig
from radlads.model.contracts import SharedInputs
from radlads.model.layers import RMSNorm
from radlads.model.registry import mixer_class
from radlads.model.rope import rope_inverse_frequencies
from radlads.model.softmax_attention import SoftmaxAttention
from radlads.model.swiglu import SwiGLU
from radlads.vllm_plugin.checks import own_config, own_share
from radlads.vllm_plugin.parameters import build_share
from radlads.vllm_plugin.register import OPERATOR
from radlads.vllm_plugin.states import StateSlots, places_of, slot_bytes


def share_of(vllm_config: VllmConfig) -> RadladsConfig:
    """The configuration of what one process computes."""
    return own_share(own_config(vllm_config.model_config), vllm_config.parallel_config.tensor_parallel_size)


class Layer(nn.Module):
    """A time mixer and a channel mixer, each behind a norm. Its parameters have the names of radlads' own block."""

    def __init__(self, vllm_config: VllmConfig, share: RadladsConfig, layer_idx: int, prefix: str):
        super().__init__()
        model_config = vllm_config.model_config
        whole, dtype = own_config(model_config), model_config.dtype
        built = {
            "rank": get_tensor_model_parallel_rank(),
            "dtype": dtype,
            "quantisation": vllm_config.quant_config,
        }
        kind = mixer_class(share.time_mixers[layer_idx])
        self.name = f"{prefix}.self_attn"
        self.self_attn = build_share(kind, whole, share, layer_idx, prefix=self.name, **built)
        self.mlp = build_share(SwiGLU, whole, share, layer_idx, prefix=f"{prefix}.mlp", **built)
        self.input_layernorm = RMSNorm(share.hidden_size, share.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(share.hidden_size, share.rms_norm_eps)
        self.num_heads, self.head_dim = share.num_attention_heads, share.head_dim
        self.attn: Attention | None = None
        if kind is SoftmaxAttention:
            self.attn = Attention(
                self.num_heads,
                self.head_dim,
                self.head_dim**-0.5,
                num_kv_heads=share.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.attn",
            )
            return
        first = share.first_value_layer
        places = places_of(share, layer_idx, dtype)
        vllm_config.compilation_config.static_forward_context[self.name] = StateSlots(
            self.self_attn,
            places,
            slot_bytes(share, dtype),
            first_values=first is not None and layer_idx > first,
        )

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, v_first: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, C] to the same shape; cos, sin [T, N]. v_first [T, H, N] is filled by the layer that makes it."""
        x = self.input_layernorm(hidden)
        if self.attn is not None:
            q, k, v = self.self_attn.queries_keys_values(x[None], SharedInputs(cos[None], sin[None]))
            mixed = self.attn(*(each[0].flatten(1) for each in (q, k, v)))
        else:
            mixed = x.new_zeros(x.shape[0], self.num_heads * self.head_dim)  # zero where vLLM pads a step
            getattr(torch.ops.vllm, OPERATOR)(x, cos, sin, v_first, mixed, self.name)
        hidden = hidden + self.self_attn.o_proj(mixed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@support_torch_compile
class Stack(nn.Module):
    """Embedding, layers and final norm."""

    frequencies: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        share = share_of(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            share.vocab_size,
            share.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.layers = nn.ModuleList(
            Layer(vllm_config, share, layer, maybe_prefix(prefix, f"layers.{layer}"))
            for layer in range(share.num_hidden_layers)
        )
        self.norm = RMSNorm(share.hidden_size, share.rms_norm_eps)
        self.heads_of_values = (share.num_attention_heads if share.first_value_layer is not None else 0, share.head_dim)
        frequencies = torch.tensor(rope_inverse_frequencies(share), dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, C] after the final norm."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        v_first = hidden.new_empty(hidden.shape[0], *self.heads_of_values)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, v_first)
        return self.norm(hidden)


class RadladsForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsQuant):
    """A converted model, pure or mixed: vLLM gives recurrent layers slots, and softmax layers blocks of its cache."""

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ((slot_bytes(share_of(vllm_config), vllm_config.model_config.dtype),),)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = own_config(vllm_config.model_config)
        self.model = Stack(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Hidden states [T, C]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill all parameters from the model's folder; the names of those that were."""
        if self.config.tie_word_embeddings:
            weights = (each for each in weights if not each[0].startswith("lm_head."))
        return AutoWeightsLoader(self).load_weights(weights)
