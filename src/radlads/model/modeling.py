"""Stack and language-model head, as transformers models. A layer is in block.py.

Shape letters: B batch, T new tokens, S all tokens so far, C hidden size, V vocabulary.
"""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .block import Block, sets_fresh_values
from .cache import RadladsCache, check_cache, check_cache_class
from .configuration import RadladsConfig
from .contracts import SharedInputs
from .exporting import is_exporting
from .layers import RMSNorm, rope_tables
from .registry import all_can
from .shared_inputs import shared_inputs
from .time_mixer import TimeMixer
from .whole_parameters import begin_gathering, whole

ActivationCheckpointing = Literal["none", "selective", "full"]
# Graphs of one function: with and without gradients, of teacher and student, of the layer that has no v_first yet
_MAX_GRAPHS = 64


class AttentionTap(NamedTuple):
    """What went into and came out of one layer's time mixer, both [B, T, C], and the inputs all mixers share."""

    layer: int
    x: torch.Tensor
    y: torch.Tensor
    shared: SharedInputs


class RadladsPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = RadladsConfig
    config: RadladsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # assisted decoding needs to take tokens back, which a recurrent state cannot
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TimeMixer) and sets_fresh_values(module):
            module.reset_fresh_parameters()
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def _initialize_weights(self, module: nn.Module, *arguments) -> None:
        """As transformers', which never asks _init_weights of a module without parameters of its own, as a block is."""
        is_begun = getattr(module, "_is_hf_initialized", False)
        if isinstance(module, Block) and not is_begun and not sets_fresh_values(module.self_attn):
            module.begin_mixer(self.config)
        super()._initialize_weights(module, *arguments)


class RadladsModel(RadladsPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: RadladsConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.whole_sequences: tuple[tuple[int, torch.device], SharedInputs] | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RadladsCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, C] after the final norm, and the cache if one was given or asked for.

        attention_mask: [B, S] (S: cached + new tokens) or [B, T] (the new ones; the cache knows the earlier), 0 at
        padding. position_ids default to counting real tokens. Where they start anew inside a row, or cu_seq_lens_q
        [texts + 1] or seq_idx [B, T] say so, and the cache is empty, a text begins that sees nothing before it; a cache
        goes on with the last one. output_hidden_states: also what goes into each block and, normed, what comes out of
        the last one, layers + 1 tensors. Raises ValueError for an empty sequence, a foreign cache class, another batch
        size than the cache's and output_attentions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.shape[1] == 0:
            raise ValueError("the sequence is empty: pass at least one token")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = RadladsCache(self.config)
        check_cache(past_key_values, hidden.shape[0])
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be off: there are no attention weights to return")
        shared = self.shared_inputs(hidden, attention_mask, position_ids, past_key_values, cu_seq_lens_q, seq_idx)
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        v_first, kept = None, []
        for block in self.layers:
            kept += [hidden] if keeps else []
            hidden, v_first = block(hidden, v_first, shared, past_key_values=past_key_values)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*kept, hidden) if keeps else None,
        )

    def attention_taps(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None) -> Iterator[AttentionTap]:
        """Run the stack on [B, T] tokens and yield every layer's tap as soon as it is there; no final norm, no head.

        seq_idx: see forward.
        """
        with whole(self):
            hidden = self.embed_tokens(input_ids)
        shared = self.shared_inputs(hidden, None, None, None, seq_idx=seq_idx)
        v_first = None
        for layer, block in enumerate(self.layers):
            assert isinstance(block, Block)
            is_last = layer + 1 == len(self.layers)
            with whole(block):
                if not is_last:
                    begin_gathering(self.layers[layer + 1])
                mix = block.compiled(Block.mix, hidden.shape[1], shared.texts)
                hidden, v_first, _, x, y = mix(block, hidden, v_first, None, shared)
                yield AttentionTap(layer, x, y, shared)
                del x, y
                # Only once the next layer is asked for: the last layer's channel mixer is nobody's input
                if not is_last:
                    hidden = block.compiled(Block.feed, hidden.shape[1])(block, hidden)

    def compile_blocks(self, enabled: bool = True, *, backend: str = "inductor") -> None:
        """From now on run both halves of each block through torch.compile, or not; a single token never is.

        Layers share graphs; the first call with new shapes takes seconds to minutes. For training and for prompts of
        many tokens. ValueError if inductor is asked for on a GPU without Triton.
        """
        if enabled and backend == "inductor" and self.device.type == "cuda" and not has_triton(self.device):
            raise ValueError("compiling for a GPU needs Triton: pip install 'radlads[gpu]', or run without compiling")
        if enabled:
            import torch._dynamo

            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
        for block in self._blocks():
            block.compile_backend = backend if enabled else None

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """Choose what training keeps for the backward pass of each block, and what it computes again.

        none: everything is kept. selective: the time mixer's half is computed again (a seventh of the forward pass
        and the recurrence), the channel mixer's two large products are kept. full: only the block's input is kept
        (a third more time). ValueError for another mode.
        """
        if mode not in get_args(ActivationCheckpointing):
            raise ValueError(f"activation checkpointing must be none, selective or full, not {mode!r}")
        # A mixer made for CUDA graphs draws nothing, and a graph cannot record how random numbers are set back
        recompute = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=not all_can(self.config, "CUDA graph")
        )
        self._set_gradient_checkpointing(mode == "full", recompute)
        for block in self._blocks():
            block.recompute_mixer = recompute if mode == "selective" else None

    def _blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def shared_inputs(
        self, hidden, attention_mask, position_ids, past_key_values, cu_seq_lens=None, seq_idx=None
    ) -> SharedInputs:
        """Masks, RoPE tables and texts of these new tokens; advances the cache's positions."""
        if all(x is None for x in (attention_mask, position_ids, past_key_values, cu_seq_lens, seq_idx)):
            return self.share_whole_sequences(hidden.shape[1], hidden.device)
        return shared_inputs(self.config, hidden, attention_mask, position_ids, past_key_values, cu_seq_lens, seq_idx)

    def share_whole_sequences(self, T: int, device: torch.device) -> SharedInputs:
        """What sequences of T tokens from their start share. Kept, since making it waits for the GPU every time."""
        if is_exporting():
            return SharedInputs(*rope_tables(self.config, torch.arange(T, device=device).unsqueeze(0)))
        if self.whole_sequences is not None and self.whole_sequences[0] == (T, device):
            return self.whole_sequences[1]
        with torch.no_grad():
            shared = SharedInputs(*rope_tables(self.config, torch.arange(T, device=device).unsqueeze(0)))
        # Tensors made in inference mode are of no use to a later training step
        if not torch.is_inference_mode_enabled():
            self.whole_sequences = (T, device), shared
        return shared


class RadladsForCausalLM(RadladsPreTrainedModel, GenerationMixin):
    """The stack with a language-model head: teacher (all mixers softmax) and student alike."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RadladsConfig):
        super().__init__(config)
        self.model = RadladsModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RadladsCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T or logits_to_keep, V]; with labels [B, T] (-100: ignored) the mean next-token loss too.

        Everything else, and errors, as in RadladsModel.forward.
        """
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        outputs = self.model(*inputs, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def compile_blocks(self, enabled: bool = True, *, backend: str = "inductor") -> None:
        """See RadladsModel.compile_blocks."""
        self.model.compile_blocks(enabled, backend=backend)

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """See RadladsModel.set_activation_checkpointing."""
        self.model.set_activation_checkpointing(mode)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give generate() our cache; its own choice goes by class names and static layouts that do not fit."""
        check_cache_class(model_kwargs.get("past_key_values"))
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} does not fit a recurrent model: "
                "leave it out, its state is constant in size already"
            )
        model_kwargs["past_key_values"] = RadladsCache(self.config)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """True where Triton, which torch.compile needs on a GPU, is installed and knows this CUDA device."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
