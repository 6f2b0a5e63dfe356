"""What passes between a mixer and the rest of the model; what a time mixer says about itself is in time_mixer.py.

Shape letters: B batch, T tokens, C hidden size, H query heads, N head size.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch

from .packed_rows import Texts
from .sequences import Sequences, Slots


class RecurrentState(NamedTuple):
    """What a recurrent mixer carries from one token to the next. Every tensor's first axis is the batch.

    wkv: [B, H, N, N] fp32; None if matrices lie in SharedInputs.slots. shift: [B, C], the last token's input; None in
    mixers without token shift.
    """

    wkv: torch.Tensor | None
    shift: torch.Tensor | None = None


class WindowedState(NamedTuple):
    """A RecurrentState of a mixer with a softmax window, and the window's part, of one size from the first token on.

    keys, values, seen: see window.HeldWindow.
    """

    wkv: torch.Tensor | None
    shift: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True)
class SharedInputs:
    """What every mixer of the stack may read, and none may change.

    cos, sin: [B or 1, T, N] RoPE tables. token_mask: [B, T], False at padding; None if there is no padding.
    attention_mask: boolean [B, 1, T, S], True where a query may look; None means plain causal (or T = 1: everything).
    texts: where rows hold several texts; None if each holds one. Read by our own mixers alone: others are run text by
    text and never see it. slots: where matrix states lie, in a server; then none go in or come out, and what else a
    state holds is [S, ...], of sequences: what rows [1, T] hold one after another, or None for rows [S, 1].
    """

    cos: torch.Tensor
    sin: torch.Tensor
    token_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    texts: Texts | None = None
    slots: Slots | None = None
    sequences: Sequences | None = None

    def to(self, *args, **kwargs) -> "SharedInputs":
        """The same on another device, which accelerate asks for where layers are spread over several."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(*args, **kwargs) for name, x in given.items() if x is not None})


class ChannelMixer(Protocol):
    """Mixes channels within a token: [B, T, C] to [B, T, C]. Built as `Mixer(config, layer_idx)`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...
