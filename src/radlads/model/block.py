"""One layer: a time mixer and a channel mixer, each behind a norm. Its halves are what torch.compile takes.

Shape letters: B batch, T new tokens, C hidden size.
"""

import functools
from collections.abc import Callable

import torch
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import RadladsCache
from .configuration import RadladsConfig, layer_type_of
from .contracts import SharedInputs
from .layers import RMSNorm
from .packed_rows import Texts, mix_rows
from .registry import build_channel_mixer, build_time_mixer
from .time_mixer import TimeMixer


class Block(GradientCheckpointingLayer):
    """Pre-norm residual block: time mixer, then channel mixer.

    mix, feed and run know no cache, so that torch.compile can take them; forward and tapped may call them compiled.
    compile_backend: torch.compile's backend once compile_blocks() asked for it, else None.
    reads_texts: whether the time mixer reads SharedInputs.texts itself.
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
        mix = functools.partial(self.compiled(Block.mixed, hidden.shape[1], shared.texts), self)
        if self.recompute_mixer is not None and self.training and torch.is_grad_enabled():
            hidden, v_first = self.recompute_mixer(mix, hidden, v_first, shared)
        else:
            hidden, v_first = mix(hidden, v_first, shared)
        return self.compiled(Block.feed, hidden.shape[1])(self, hidden), v_first

    def _cached(self, hidden, v_first, shared: SharedInputs, past_key_values: RadladsCache):
        state = past_key_values.load(self.layer_idx)
        # A softmax layer's state is a view of the cache itself, which no graph can hold
        in_graph = state is None or isinstance(state, tuple)
        run = self.compiled(Block.run, hidden.shape[1], shared.texts) if in_graph else Block.run
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
        y, state, v_first = mix_rows(self.self_attn, x, state, v_first, shared, reads_texts=self.reads_texts)
        return hidden + y, v_first, state, x, y

    def mixed(self, hidden, v_first, shared: SharedInputs):
        """mix from the start of a sequence, hidden and v_first alone: what else a graph returned, it would have to
        take gradients for."""
        hidden, v_first, _, _, _ = self.mix(hidden, v_first, None, shared)
        return hidden, v_first

    def feed(self, hidden):
        """The second half, norm and channel mixer."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def compiled(self, function: Callable, num_tokens: int, texts: Texts | None = None) -> Callable:
        """`function`, compiled if compile_blocks() asked for it. Single tokens are run as they are, and so are texts
        that the time mixer gets one by one: they have other shapes in every batch, and would be compiled anew."""
        run_apart = texts is not None and not self.reads_texts
        if self.compile_backend is None or num_tokens == 1 or run_apart:
            return function
        return _compiled(function, self.compile_backend)


def sets_fresh_values(mixer: TimeMixer) -> bool:
    """Whether the mixer's reset_fresh_parameters knows all of its parameters: it has one, and no subclass has added
    parameters in a constructor of its own since."""
    kind = next(each for each in type(mixer).__mro__ if {"__init__", "reset_fresh_parameters"} & vars(each).keys())
    return kind is not TimeMixer and "reset_fresh_parameters" in vars(kind)


@functools.cache
def _compiled(function: Callable, backend: str) -> Callable:
    """torch.compile's graph of a function of a module, which all modules of the same structure share."""
    return torch.compile(function, backend=backend)
