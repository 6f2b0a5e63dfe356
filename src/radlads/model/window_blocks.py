"""The softmax window by blocks in torch alone: the path for CPUs, and for what window_triton.py has no kernels for.

A block of queries sees the keys of its own block and of the window before it, and the sinks: memory is linear in the
length. Here is also where a token is among what is held and what is new.

Shape letters: B batch, T tokens, H query heads, K key/value heads, G = H / K, N head size, W window, S sinks, L block,
M number of blocks.
"""

import torch
import torch.nn.functional as F

from .window import HeldWindow, WindowSettings

LEAST_BLOCK = 64
"""Queries of a block where the window is shorter: smaller blocks only cost time."""


def attend_in_blocks(q, k, v, held: HeldWindow | None, window: WindowSettings) -> torch.Tensor:
    """window_attention's output, without padding and packed rows. Differentiable."""
    B, T, K, N = k.shape
    W, S, device = window.window_tokens, window.sink_tokens, k.device
    block = min(T, max(W, LEAST_BLOCK))
    before = min(W, T) if held is None else W  # keys that the first block sees beside its own
    seen = torch.zeros(1, 1, dtype=torch.int64, device=device) if held is None else held.seen[:, None]
    sinks, context = torch.arange(S, device=device)[None], seen + torch.arange(-before, 0, device=device)

    def blocks_of(x, old):
        line, x = line_of(x, old), x.transpose(1, 2)
        first, earlier = at_places(line, place_of(sinks, seen, held, window)), x.new_zeros(B, K, before, N)
        if old is not None:
            earlier = at_places(line, place_of(context, seen, held, window))
        return _key_blocks(torch.cat([earlier, x], dim=2), first, block, before)

    old_keys, old_values = (None, None) if held is None else (held.keys, held.values)
    visible = _visible(seen, T, block, before, window)
    return _in_blocks(q, blocks_of(k, old_keys), blocks_of(v, old_values), visible, block)


def slot_of(tokens: torch.Tensor, window: WindowSettings) -> torch.Tensor:
    """The slots of tokens, counted from the text's start."""
    S = window.sink_tokens
    return torch.where(tokens < S, tokens, S + (tokens - S) % window.window_tokens)


def place_of(tokens: torch.Tensor, seen: torch.Tensor, held: HeldWindow | None, window: WindowSettings) -> torch.Tensor:
    """Where tokens, counted from the text's start, are among the slots held and the new tokens behind them."""
    if held is None:
        return tokens
    return torch.where(tokens < seen, slot_of(tokens, window), window.held_tokens + tokens - seen)


def line_of(x_BTKN: torch.Tensor, old_BKN: torch.Tensor | None) -> torch.Tensor:
    """What is held and then what is new, [B, K, S + W + T, N], or what is new alone, [B, K, T, N]."""
    x = x_BTKN.transpose(1, 2)
    return x if old_BKN is None else torch.cat([old_BKN.to(x.dtype), x], dim=2)


def at_places(line_BKN: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
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
