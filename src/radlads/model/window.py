"""Softmax attention over the last and the first tokens, which a recurrent mixer may have beside its recurrence.

RecurrentMixer.finish adds it to the recurrence's output. It is exact, and its memory is linear in the length: a block
of queries sees the keys of its own block and of the window before it. Here are the settings, the attention and the
state.

Shape letters: B batch, T tokens, H query heads, K key/value heads, G = H / K, N head size, W window, S sinks, L block,
M number of blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .mixer_settings import added
from .packed_rows import Texts
from .time_mixer import StateTensor, Use

if TYPE_CHECKING:
    from .configuration import RadladsConfig

LEAST_BLOCK = 64
"""Queries of a block where the window is shorter: smaller blocks only cost time."""
OBSTACLES: Mapping[Use, str] = {
    "llama.cpp": "it has no softmax window inside a recurrent layer (window_tokens)",
    "published format": "it has no softmax window inside a recurrent layer (window_tokens)",
}
"""What a mixer with a window cannot be used for."""


@dataclass(frozen=True)
class WindowSettings:
    """Of the recurrent mixers. With window_tokens 0 they are the paper's."""

    window_tokens: int = added(0)
    """Add the teacher's softmax attention over this many last tokens, the token itself included, to the recurrence; 0:
    none. The state keeps their keys and values."""
    sink_tokens: int = added(0)
    """Let that attention see this many first tokens of the text as well. It needs window_tokens."""

    def __post_init__(self):
        for name in ("window_tokens", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.sink_tokens and not self.window_tokens:
            raise ValueError(
                f"sink_tokens is {self.sink_tokens}, but there is no window that could see them: set window_tokens too"
            )

    @property
    def held_tokens(self) -> int:
        """Number of tokens whose keys and values the state has room for."""
        return self.window_tokens + self.sink_tokens


class HeldWindow(NamedTuple):
    """The window's part of a state (contracts.WindowedState).

    keys, values: [B, K, S + W, N]. Token p of the text, counted from 0, is in slot p if p < S, and else in slot
    S + (p - S) mod W, which the token W before it leaves. So slots fill in order, and all that are filled are seen.
    seen: [B] int64, the number of tokens so far.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor


def window_of(config: "RadladsConfig", layer_idx: int) -> WindowSettings | None:
    """A layer's window; None if it has none.

    Raises ValueError for one that the model cannot have.
    """
    settings = config.settings_of(layer_idx)
    # By name: transformers loads an export's modules twice, and the configuration's class is another one then
    if WindowSettings.__name__ not in {kind.__name__ for kind in type(settings).__mro__} or not settings.window_tokens:
        return None
    if settings.held_tokens > config.max_position_embeddings:
        raise ValueError(
            f"model.mixer.window_tokens {settings.window_tokens} and sink_tokens {settings.sink_tokens} are more than "
            f"the {config.max_position_embeddings} tokens of the model's context: give fewer"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"model.mixer.window_tokens needs an even head_dim for RoPE, not {config.head_dim}: leave it out"
        )
    return settings


def held_tensors(config: "RadladsConfig", window: WindowSettings) -> dict[str, StateTensor]:
    """The tensors of HeldWindow for TimeMixer.state_tensors."""
    shape = config.num_key_value_heads, window.held_tokens, config.head_dim
    return {"keys": StateTensor(shape), "values": StateTensor(shape), "seen": StateTensor((), torch.int64)}


def kept_bytes(config: "RadladsConfig", window: WindowSettings) -> float:
    """Bytes per token that the attention keeps for the backward pass under bf16, as counted, not measured.

    The blocks' queries, keys and values, what each query may see (as the mask that is added to the scores), the output,
    fp32 sums of each row's scores, and what the output projection reads now.
    """
    H, K, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    keys_per_query = 2 + window.sink_tokens / max(window.window_tokens, LEAST_BLOCK)
    mask = H // K * (2 * max(window.window_tokens, LEAST_BLOCK) + window.sink_tokens)
    return 2 * (H * N + keys_per_query * 2 * K * N + mask + H * N) + 4 * H + 2 * H * N


def backward_bytes(config: "RadladsConfig", window: WindowSettings) -> float:
    """Bytes per token of the gradients of the output and of the blocks' queries, keys and values."""
    H, K, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return 2 * (2 * H * N + (2 + window.sink_tokens / max(window.window_tokens, LEAST_BLOCK)) * 2 * K * N)


def window_attention(
    q_BTHN: torch.Tensor,
    k_BTKN: torch.Tensor,
    v_BTKN: torch.Tensor,
    held: HeldWindow | None,
    window: WindowSettings,
    *,
    token_mask: torch.Tensor | None,
    texts: Texts | None,
) -> tuple[torch.Tensor, HeldWindow]:
    """Causal softmax attention, scores scaled by N^-1/2, over the last W and the first S tokens of each text.

    held: of the tokens before these; None at the start of a text. token_mask: [B, T], False at padding, which no token
    sees and which changes nothing in what is held; its own output means nothing. texts: where rows hold several.
    Returns [B, T, H, N], and what is held after the last token. Never waits for the device.
    """
    if texts is None:
        return _attend_real(q_BTHN, k_BTKN, v_BTKN, held, window, token_mask)
    assert held is None, "packed rows start without a state"
    real = torch.ones_like(texts.starts) if token_mask is None else token_mask
    pieces = zip(*map(texts.cut, (q_BTHN, k_BTKN, v_BTKN, real)), strict=True)
    outs, ends = zip(*(_attend_real(q, k, v, None, window, mask) for q, k, v, mask in pieces), strict=True)
    return texts.paste(outs), HeldWindow(*(texts.at_row_ends(each) for each in zip(*ends, strict=True)))


def _attend_real(q, k, v, held: HeldWindow | None, window: WindowSettings, token_mask: torch.Tensor | None):
    """window_attention for rows of one text. Real tokens are moved to the left, past all padding, and back again."""
    attend = _attend_one if q.shape[1] == 1 else _attend_many
    if token_mask is None:
        return attend(q, k, v, held, window, None)
    order = token_mask.logical_not().int().argsort(dim=1, stable=True)
    q, k, v = (torch.take_along_dim(x, order[:, :, None, None], dim=1) for x in (q, k, v))
    out, held = attend(q, k, v, held, window, token_mask.sum(1))
    return torch.take_along_dim(out, order.argsort(dim=1)[:, :, None, None], dim=1), held


def _attend_one(q, k, v, held: HeldWindow | None, window: WindowSettings, lengths: torch.Tensor | None):
    """A single token, which is put into its slot and then sees all slots that are filled."""
    B, _, K, N = k.shape
    if held is None:
        empty = k.new_zeros(B, K, window.held_tokens, N)
        held = HeldWindow(empty, empty, torch.zeros(B, dtype=torch.int64, device=k.device))
    slots = torch.arange(window.held_tokens, device=k.device)
    written = slots == _slot(held.seen, window)[:, None]
    if lengths is not None:
        written = written & (lengths > 0)[:, None]
    keys = torch.where(written[:, None, :, None], k.transpose(1, 2), held.keys.to(k.dtype))
    values = torch.where(written[:, None, :, None], v.transpose(1, 2), held.values.to(v.dtype))
    seen = held.seen + (1 if lengths is None else lengths)
    # Padding before the first token sees an empty slot, because a softmax over nothing is NaN
    visible = slots < seen.clamp(min=1)[:, None]
    out = F.scaled_dot_product_attention(
        q.unflatten(2, (K, -1)).squeeze(1), keys, values, attn_mask=visible[:, None, None, :]
    )
    return out.flatten(1, 2).unsqueeze(1), HeldWindow(keys, values, seen)


def _attend_many(q, k, v, held: HeldWindow | None, window: WindowSettings, lengths: torch.Tensor | None):
    """Several tokens, of which the first `lengths` [B] are real (None: all)."""
    B, T, K, N = k.shape
    W, S, device = window.window_tokens, window.sink_tokens, k.device
    block = min(T, max(W, LEAST_BLOCK))
    before = min(W, T) if held is None else W  # keys that the first block sees beside its own
    seen = torch.zeros(1, 1, dtype=torch.int64, device=device) if held is None else held.seen[:, None]
    sinks, context = torch.arange(S, device=device)[None], seen + torch.arange(-before, 0, device=device)
    rows = seen.expand(B, 1) + (T if lengths is None else lengths[:, None])
    newest = _newest(rows, window)
    blocks, ends = [], []
    for x, old in ((k, None if held is None else held.keys), (v, None if held is None else held.values)):
        x = x.transpose(1, 2)
        line = x if old is None else torch.cat([old.to(x.dtype), x], dim=2)
        first, last = _at(line, _place(sinks, seen, held, window)), _at(line, _place(newest, seen, held, window))
        earlier = x.new_zeros(B, K, before, N) if old is None else _at(line, _place(context, seen, held, window))
        blocks.append(_key_blocks(torch.cat([earlier, x], dim=2), first, block, before))
        filled = torch.arange(window.held_tokens, device=device) < rows
        ends.append(torch.where(filled[:, None, :, None], last, 0))
    visible = _visible(seen, T, block, before, window)
    (keys, values), (last_keys, last_values) = blocks, ends
    return _in_blocks(q, keys, values, visible, block), HeldWindow(last_keys, last_values, rows[:, 0])


def _slot(tokens: torch.Tensor, window: WindowSettings) -> torch.Tensor:
    """The slots of tokens, counted from the text's start."""
    S = window.sink_tokens
    return torch.where(tokens < S, tokens, S + (tokens - S) % window.window_tokens)


def _newest(seen: torch.Tensor, window: WindowSettings) -> torch.Tensor:
    """The newest token of each slot, [B, S + W], after `seen` [B, 1]; where none has come, another one."""
    slots = torch.arange(window.held_tokens, device=seen.device)
    return torch.where(slots < window.sink_tokens, slots, seen - 1 - (seen - 1 - slots) % window.window_tokens)


def _place(tokens: torch.Tensor, seen: torch.Tensor, held: HeldWindow | None, window: WindowSettings) -> torch.Tensor:
    """Where tokens, counted from the text's start, are among the slots held and the new tokens behind them."""
    if held is None:
        return tokens
    return torch.where(tokens < seen, _slot(tokens, window), window.held_tokens + tokens - seen)


def _at(line_BKN: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """line [B, K, X, N] at places [B or 1, Y]: [B, K, Y, N]. A place that does not exist gives any other one."""
    places = places.clamp(0, line_BKN.shape[2] - 1)
    return torch.take_along_dim(line_BKN, places[:, None, :, None], dim=2)


def _key_blocks(line: torch.Tensor, first: torch.Tensor, block: int, before: int) -> torch.Tensor:
    """What each block of queries may see of keys or values, [B * M, K, S + before + L, N].

    line: [B, K, before + T, N]. first: the sinks, [B, K, S, N].
    """
    num_tokens = line.shape[2] - before
    line = F.pad(line, (0, 0, 0, -num_tokens % block))
    own = line.unfold(2, before + block, block).permute(0, 2, 1, 4, 3)
    first = first[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat([first, own], dim=3).flatten(0, 1)


def _visible(seen: torch.Tensor, T: int, block: int, before: int, window: WindowSettings) -> torch.Tensor:
    """Boolean [B or 1, M, L, S + before + L]: what each query may see of its block's keys: something, always."""
    device = seen.device
    starts = seen + torch.arange(0, T, block, device=device)  # [B or 1, M], each block's first token
    queries, keys = torch.arange(block, device=device), torch.arange(before + block, device=device) - before
    distance = queries[:, None] - keys
    near = (distance >= 0) & (distance < window.window_tokens)
    # Sinks are seen as such, also while the window holds them
    later = (starts[:, :, None] + keys) >= window.sink_tokens
    sinks = torch.arange(window.sink_tokens, device=device) <= (starts[:, :, None] + queries)[..., None]
    return torch.cat([sinks, near & later[:, :, None, :]], dim=-1)


def _in_blocks(q_BTHN: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, block: int):
    """Attention of blocks of queries to their keys and values (_key_blocks): [B, T, H, N].

    The G query heads of a key/value head are so many more queries of it, which repeats no keys.
    """
    B, T, H, N = q_BTHN.shape
    K, G, M = keys.shape[1], H // keys.shape[1], visible.shape[1]
    q = F.pad(q_BTHN, (0, 0, 0, 0, 0, -T % block)).view(B, M, block, K, G, N).permute(0, 1, 3, 4, 2, 5)
    mask = visible[:, :, None].expand(B, -1, G, -1, -1).reshape(B * M, 1, G * block, -1)
    out = F.scaled_dot_product_attention(q.reshape(B * M, K, G * block, N), keys, values, attn_mask=mask)
    return out.view(B, M, K, G, block, N).permute(0, 1, 4, 2, 3, 5).reshape(B, M * block, H, N)[:, :T]
