"""Block, stack and language-model head, as transformers models.

Shape letters: B batch, T new tokens, S all tokens so far, C hidden size, V vocabulary.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cache import RadladsCache, check_cache, check_cache_class
from .configuration import RadladsConfig, layer_type_of
from .contracts import SharedInputs
from .layers import RMSNorm, rope_tables
from .packed_rows import find_texts, mix_texts
from .registry import all_can, build_channel_mixer, build_time_mixer
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


class Block(GradientCheckpointingLayer):
    """Pre-norm residual block: time mixer, then channel mixer.

    mix, feed and run know no cache, so that torch.compile can take them; forward and tapped may call them compiled.
    compile_backend: torch.compile's backend once compile_blocks() asked for it, else None.
    recompute_mixer: what runs the first half in training, and again in the backward pass, instead of keeping what it
    made; None: it is kept.
    """

    compile_backend: str | None = None
    recompute_mixer: Callable | None = None

    def __init__(self, config: RadladsConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = build_time_mixer(config, layer_idx)
        self._check_state(config)
        self.reads_texts = type(self.self_attn).obstacle("packed rows") is None
        self.mlp = build_channel_mixer(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _check_state(self, config: RadladsConfig) -> None:
        """Raise ValueError if the configuration says of the state what the mixer does not."""
        kind, said = type(self.self_attn), config.layer_types[self.layer_idx]
        if layer_type_of(kind) != said:
            raise ValueError(
                f"config.layer_types calls layer {self.layer_idx} {said}, but {kind.name_for_people()} is "
                f"{layer_type_of(kind)}: correct it in config.json"
            )

    def begin_mixer(self, config: RadladsConfig) -> None:
        """Give the mixer's fresh parameters the values that its constructor gave, unless they were read from a
        checkpoint: transformers has filled the layers inside with its own."""
        own = dict(self.self_attn.named_parameters())
        fresh = [name for name in own if name.partition(".")[0] not in self.self_attn.from_teacher]
        if all(own[name].is_meta for name in fresh):
            return
        with torch.device("cpu"):
            begun = dict(build_time_mixer(config, self.layer_idx).named_parameters())
        for name in fresh:
            init.copy_(own[name], begun[name])

    def forward(self, hidden, v_first, shared: SharedInputs, past_key_values: RadladsCache | None = None):
        """hidden [B, T, C] and v_first to the same after this block. Tensors are positional for checkpointing."""
        if past_key_values is not None:
            return self._cached(hidden, v_first, shared, past_key_values)
        # Every batch of packed rows has other shapes, and would be compiled anew
        mixed = self.compiled(Block.mixed, hidden.shape[1]) if shared.texts is None else Block.mixed
        mix = functools.partial(mixed, self)
        if self.recompute_mixer is not None and self.training and torch.is_grad_enabled():
            hidden, v_first = self.recompute_mixer(mix, hidden, v_first, shared)
        else:
            hidden, v_first = mix(hidden, v_first, shared)
        return self.compiled(Block.feed, hidden.shape[1])(self, hidden), v_first

    def _cached(self, hidden, v_first, shared: SharedInputs, past_key_values: RadladsCache):
        state = past_key_values.load(self.layer_idx)
        # A softmax layer's state is a view of the cache itself, which no graph can hold
        in_graph = (state is None or isinstance(state, tuple)) and shared.texts is None
        run = self.compiled(Block.run, hidden.shape[1]) if in_graph else Block.run
        num_tokens = hidden.shape[1]
        hidden, v_first, state = run(self, hidden, v_first, state, shared)
        past_key_values.store(self.layer_idx, state, num_tokens)
        return hidden, v_first

    def run(self, hidden, v_first, state, shared: SharedInputs):
        """The whole block: hidden, v_first and the mixer's state after it."""
        hidden, v_first, state, _, _ = self.mix(hidden, v_first, state, shared)
        return self.feed(hidden), v_first, state

    def mix(self, hidden, v_first, state, shared: SharedInputs):
        """The first half, norm and time mixer: what run returns, and the mixer's input and output."""
        x = self.input_layernorm(hidden)
        if shared.token_mask is not None:
            x = x * shared.token_mask.unsqueeze(-1).to(x.dtype)
        if shared.texts is None or self.reads_texts:
            y, state, v_first = self.self_attn(x, state, v_first, shared)
        else:
            y, state, v_first = mix_texts(self.self_attn, x, v_first, shared)
        return hidden + y, v_first, state, x, y

    def mixed(self, hidden, v_first, shared: SharedInputs):
        """mix from the start of a sequence, hidden and v_first alone: what else a graph returned, it would have to
        take gradients for."""
        hidden, v_first, _, _, _ = self.mix(hidden, v_first, None, shared)
        return hidden, v_first

    def feed(self, hidden):
        """The second half, norm and channel mixer."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def compiled(self, function: Callable, num_tokens: int) -> Callable:
        """`function`, compiled if compile_blocks() asked for it; single tokens are run as they are."""
        if self.compile_backend is None or num_tokens == 1:
            return function
        return _compiled(function, self.compile_backend)


def begins_by_itself(mixer: TimeMixer) -> bool:
    """Whether the mixer's reset_fresh_parameters knows all of its parameters: it has one, and no subclass has added
    parameters in a constructor of its own since."""
    kind = next(each for each in type(mixer).__mro__ if {"__init__", "reset_fresh_parameters"} & vars(each).keys())
    return kind is not TimeMixer and "reset_fresh_parameters" in vars(kind)


@functools.cache
def _compiled(function: Callable, backend: str) -> Callable:
    """torch.compile's graph of a function of a module, which all modules of the same structure share."""
    return torch.compile(function, backend=backend)


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
        if isinstance(module, TimeMixer) and begins_by_itself(module):
            module.reset_fresh_parameters()
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def _initialize_weights(self, module: nn.Module, *arguments) -> None:
        """As transformers', which never asks _init_weights of a module without parameters of its own, as a block is."""
        is_begun = getattr(module, "_is_hf_initialized", False)
        if isinstance(module, Block) and not is_begun and not begins_by_itself(module.self_attn):
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

    def attention_taps(self, input_ids: torch.Tensor) -> Iterator[AttentionTap]:
        """Run the stack on [B, T] tokens and yield every layer's tap as soon as it is there; no final norm, no head."""
        with whole(self):
            hidden = self.embed_tokens(input_ids)
        shared = self.shared_inputs(hidden, None, None, None)
        v_first = None
        for layer, block in enumerate(self.layers):
            assert isinstance(block, Block)
            is_last = layer + 1 == len(self.layers)
            with whole(block):
                if not is_last:
                    begin_gathering(self.layers[layer + 1])
                mix = block.compiled(Block.mix, hidden.shape[1])
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
        B, T, _ = hidden.shape
        if all(x is None for x in (attention_mask, position_ids, past_key_values, cu_seq_lens, seq_idx)):
            return self.share_whole_sequences(T, hidden.device)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        earlier = None if past_key_values is None else past_key_values.padding_mask
        padded = self._padding_mask(attention_mask, earlier, past, hidden)
        token_mask = None if padded is None or is_all_true(padded[:, -T:]) else padded[:, -T:]
        if past and (cu_seq_lens is not None or seq_idx is not None):
            raise ValueError("cu_seq_lens_q and seq_idx are for packed rows, which need an empty cache: leave them out")
        # Single tokens are most of generation, and an exported graph cannot depend on what its inputs hold
        can_be_packed = past == 0 and T > 1 and not torch.compiler.is_exporting()
        texts = find_texts(hidden, token_mask, position_ids, cu_seq_lens, seq_idx) if can_be_packed else None
        if position_ids is None:
            position_ids = self._positions(token_mask, past_key_values, past, hidden)
            position_ids = position_ids if texts is None else texts.positions_in_text(position_ids)
        softmax_mask = self._softmax_mask(padded, past, T, hidden.device, texts)
        if texts is not None:
            padded = texts.in_last_text() if padded is None else padded & texts.in_last_text()
        if past_key_values is not None:
            past_key_values.next_positions = (position_ids[:, -1] + 1).expand(B).clone()
            past_key_values.padding_mask = padded if "full_attention" in self.config.layer_types else None
        cos, sin = rope_tables(self.config, position_ids)
        return SharedInputs(cos, sin, token_mask, softmax_mask, texts)

    def share_whole_sequences(self, T: int, device: torch.device) -> SharedInputs:
        """What sequences of T tokens from their start share. Kept, since making it waits for the GPU every time."""
        if torch.compiler.is_exporting():
            return SharedInputs(*rope_tables(self.config, torch.arange(T, device=device).unsqueeze(0)))
        if self.whole_sequences is not None and self.whole_sequences[0] == (T, device):
            return self.whole_sequences[1]
        with torch.no_grad():
            shared = SharedInputs(*rope_tables(self.config, torch.arange(T, device=device).unsqueeze(0)))
        # Tensors made in inference mode are of no use to a later training step
        if not torch.is_inference_mode_enabled():
            self.whole_sequences = (T, device), shared
        return shared

    def _padding_mask(self, attention_mask, earlier, past: int, hidden) -> torch.Tensor | None:
        """Boolean [B, S], False at padding; None where nothing is padded. `earlier`: the cached tokens' mask."""
        B, T, _ = hidden.shape
        if attention_mask is None:
            if earlier is None:
                return None
            attention_mask = earlier.new_ones(B, T)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != B:
            raise ValueError(f"attention_mask must be [batch, tokens], not {tuple(attention_mask.shape)}")
        mask = attention_mask.bool()
        if mask.shape[1] == T and past:
            mask = torch.cat([mask.new_ones(B, past) if earlier is None else earlier, mask], dim=1)
        elif mask.shape[1] == past + T and past and earlier is not None:
            # Whoever gives a mask of all tokens, as generate does, knows nothing of packed rows in the cache
            mask = torch.cat([mask[:, :past] & earlier, mask[:, past:]], dim=1)
        if mask.shape[1] != past + T:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, but there are {past} cached and {T} new ones"
            )
        return None if is_all_true(mask) else mask

    def _positions(self, token_mask, past_key_values, past: int, hidden) -> torch.Tensor:
        """Positions [B or 1, T] that count real tokens only, continuing the cache's; a pad has the last token's."""
        T, device = hidden.shape[1], hidden.device
        if token_mask is None:
            steps = torch.arange(T, device=device).unsqueeze(0)
        else:
            steps = token_mask.long().cumsum(-1) - 1
        if past and past_key_values.next_positions is not None:
            return steps + past_key_values.next_positions.unsqueeze(1).to(device)
        return steps + past

    def _softmax_mask(self, padded: torch.Tensor | None, past: int, T: int, device, texts) -> torch.Tensor | None:
        """Boolean [B or 1, 1, T, S] for softmax layers; None where plain causal attention is meant."""
        is_plain = padded is None and texts is None and (past == 0 or T == 1)
        if "full_attention" not in self.config.layer_types or is_plain:
            return None
        queries = torch.arange(past, past + T, device=device)
        causal = (queries[:, None] >= torch.arange(past + T, device=device)[None, :])[None, None]
        if texts is not None:
            causal = causal & texts.in_same_text().unsqueeze(1)
        if padded is None:
            return causal
        # A padded query sees itself, so that no row is empty (its output is never used)
        itself = queries[:, None] == torch.arange(past + T, device=device)[None, :]
        return (causal & padded[:, None, None, :]) | itself


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


def is_all_true(mask: torch.Tensor) -> bool:
    """True if all of a mask is True; False in an exported graph, which must fit every mask. Waits for the device."""
    return not torch.compiler.is_exporting() and bool(mask.all())
