"""What a time mixer says about itself: all that the rest of the house asks of one (docs/mixers.md).

Shape letters: B batch, T tokens, C hidden size, H query heads, N head size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from .contracts import SharedInputs
from .mixer_settings import NoSettings

if TYPE_CHECKING:
    from .configuration import RadladsConfig

Use = Literal["llama.cpp", "vLLM", "published format", "CUDA graph", "fused decode", "packed rows"]
"""What a mixer may be made for. vLLM: radlads' plugin serves it (docs/vllm.md). CUDA graph: its code never waits for
the device and draws no random numbers. packed rows: it reads SharedInputs.texts itself; others are run text by text."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state, for one sequence.

    shape: without the batch axis. dtype: None = the dtype that the model computes in. per_token: the state has one of
    these for every token so far, as keys and values are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    per_token: bool = False

    def num_bytes(self, context_tokens: int, bytes_per_value: int) -> int:
        """Bytes after so many tokens. bytes_per_value: of the dtype that the model computes in."""
        size = bytes_per_value if self.dtype is None else self.dtype.itemsize
        return math.prod(self.shape) * size * (context_tokens if self.per_token else 1)


@dataclass(frozen=True)
class MixerWeights:
    """Weights of one layer's time mixer that a token is multiplied with.

    at_input: those that multiply the layer's input, whose gradient stage 1 does not need. inside: all others.
    """

    at_input: int
    inside: int


class TimeMixer(nn.Module):
    """Base class of all time mixers, built as `Mixer(config, layer_idx)`.

    Every attribute and class method has a default, so that a mixer of one's own says only where it differs. Class
    methods take a configuration and a layer's index, and never build a model on a device.

    title: the name for people; '' = the class's own name without its prefix.
    Settings: a frozen dataclass of the mixer's own settings (docs/mixers.md). They are set as --model.mixer.KEY; the
    constructor reads them from config.settings_of(layer_idx).
    variants: what --variant may name, and the keys of the model section that each stands for. The first is the default.
    state_grows: whether the state grows with the text. Such a mixer gets a KeyValueState as its state.
    shares_first_values: whether the first layer of this kind makes the values v_first that later ones read.
    from_teacher: the submodules (or parameters) that begin as the teacher's of the same name. All others are fresh, and
    begin as the constructor leaves them.
    decay_and_shift: patterns of the parameters that train.trainable `decay` trains.
    made_for: the uses that this very class is made for. A subclass computes something else, and does not inherit them.
    obstacles: the reasons why it is not made for others.
    """

    title: ClassVar[str] = ""
    Settings: ClassVar[type] = NoSettings
    variants: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    state_grows: ClassVar[bool] = False
    shares_first_values: ClassVar[bool] = False
    from_teacher: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    decay_and_shift: ClassVar[tuple[str, ...]] = ()
    made_for: ClassVar[frozenset[Use]] = frozenset()
    obstacles: ClassVar[Mapping[Use, str]] = {}

    def forward(
        self, x: torch.Tensor, state: Any, v_first: torch.Tensor | None, shared: SharedInputs
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Mix x [B, T, C] (T >= 1, normed, zero at padding) along time: y [B, T, C], the state after it, and v_first.

        state: what the layer carries from earlier tokens, a NamedTuple of tensors whose first axis is the batch; None
        at the start of a sequence. v_first: [B, T, H, N], the values of the first layer that shares_first_values, None
        before it; hand it on. Splitting a sequence anywhere and carrying the state changes nothing but rounding. A
        padded position leaves the state as it was.
        """
        raise NotImplementedError

    def reset_fresh_parameters(self) -> None:
        """Set what the teacher does not provide to its initial values, in place.

        transformers fills every nn.Linear after the constructor, so a mixer that does not define this gets the values
        of another one that is built for it. Use transformers.initialization's functions, which leave a tensor alone
        that was read from a checkpoint.
        """

    @classmethod
    def name_for_people(cls) -> str:
        """The title, or else the class's name."""
        return cls.title or cls.__name__.removeprefix("TMix_")

    @classmethod
    def obstacle(cls, use: Use) -> str | None:
        """Why the mixer cannot be used so; None if it can."""
        if use in vars(cls).get("made_for", ()):
            return None
        return vars(cls).get("obstacles", {}).get(use, f"{cls.name_for_people()} is not made for it")

    @classmethod
    def obstacle_in(cls, config: "RadladsConfig", layer_idx: int, use: Use) -> str | None:
        """Why a model's layer cannot be used so, by its settings too; None if it can. By default as obstacle()."""
        return cls.obstacle(use)

    @classmethod
    def state_tensors(cls, config: "RadladsConfig", layer_idx: int) -> dict[str, StateTensor]:
        """The tensors of a layer's state by the names of its NamedTuple; those that are None there are left out.

        By default keys and values if the state grows; else a token without data is run through the mixer. Raises
        ValueError if that does not work.
        """
        if cls.state_grows:
            shape = config.num_key_value_heads, config.head_dim
            return {"keys": StateTensor(shape, per_token=True), "values": StateTensor(shape, per_token=True)}
        try:
            state = _state_after_a_token(cls, config, layer_idx)
        except Exception as error:  # anybody's code
            raise ValueError(
                f"the state of {cls.name_for_people()} cannot be found by running it on the meta device "
                f"({type(error).__name__}: {error}): define its state_tensors"
            ) from error
        held = {} if state is None else state._asdict()
        return {name: _described(x) for name, x in held.items() if x is not None}

    @classmethod
    def product_weights(cls, config: "RadladsConfig", layer_idx: int) -> MixerWeights:
        """The matrices of a layer, in weights. By default all count as inside."""
        return MixerWeights(0, sum(math.prod(shape) for shape in _matrices(cls, config, layer_idx)))

    @classmethod
    def mixing_flops(cls, config: "RadladsConfig", layer_idx: int, context_tokens: float) -> float:
        """FLOPs per token along time, forward, after `context_tokens` tokens. By default 4 for each element of the
        state: 2 to write it and 2 to read it."""
        tensors = cls.state_tensors(config, layer_idx).values()
        return float(sum(4 * math.prod(x.shape) * (context_tokens if x.per_token else 1) for x in tensors))

    @classmethod
    def kept_bytes(cls, config: "RadladsConfig", layer_idx: int, *, wide: bool) -> float:
        """Bytes per token that a forward pass keeps for the backward pass, the normed input included, under bf16.

        wide: mixed precision, with an fp32 residual stream. By default each matrix's input and output,
        which is too little for a mixer that keeps more.
        """
        rows_and_columns = sum(sum(shape) for shape in _matrices(cls, config, layer_idx))
        return 2.0 * (config.hidden_size + rows_and_columns)

    @classmethod
    def backward_bytes(cls, config: "RadladsConfig", layer_idx: int) -> float:
        """Bytes per token that the backward pass adds when all its gradients are there, less those it has freed. By
        default as much as kept_bytes."""
        return cls.kept_bytes(config, layer_idx, wide=False)


def defines_kept_bytes(kind: type[TimeMixer]) -> bool:
    """Whether the mixer defines kept_bytes, and leaves it to no estimate."""
    return kind.kept_bytes.__func__ is not TimeMixer.kept_bytes.__func__  # type: ignore[attr-defined]


def _on_meta(cls: type[TimeMixer], config: "RadladsConfig", layer_idx: int) -> TimeMixer:
    with torch.device("meta"):
        return cls(config, layer_idx)


def _matrices(cls: type[TimeMixer], config: "RadladsConfig", layer_idx: int) -> list[torch.Size]:
    return [
        each.shape for each in _on_meta(cls, config, layer_idx).parameters() if each.ndim >= 2 and 1 not in each.shape
    ]


@torch.no_grad()
def _state_after_a_token(cls: type[TimeMixer], config: "RadladsConfig", layer_idx: int) -> Any:
    """The state of one sequence after one token, on the meta device, computed in bf16."""
    mixer = _on_meta(cls, config, layer_idx).to(torch.bfloat16)
    heads, size = config.num_attention_heads, config.head_dim
    with torch.device("meta"):
        x = torch.empty(1, 1, config.hidden_size, dtype=torch.bfloat16)
        v_first = torch.empty(1, 1, heads, size, dtype=torch.bfloat16)
        shared = SharedInputs(torch.empty(1, 1, size), torch.empty(1, 1, size))
        return mixer(x, None, v_first, shared)[1]


def _described(x: torch.Tensor) -> StateTensor:
    return StateTensor(tuple(x.shape[1:]), None if x.dtype == torch.bfloat16 else x.dtype)
