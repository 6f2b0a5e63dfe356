"""Computes a recurrent mixer's softmax window: padding, packed rows, the path for the device, and what is held after.

On CUDA several tokens run on our own kernels (window_triton.py), elsewhere by blocks in torch (window_blocks.py).

Shape letters: B batch, T tokens, H query heads, K key/value heads, N head size, W window, S sinks.
"""

import torch
import torch.nn.functional as F

from .chunked_kernels import triton
from .exporting import is_exporting
from .packed_rows import Texts, run_text_by_text
from .recurrence import OLDEST_CAPABILITY, capability, kernel_dtype
from .window import HeldWindow, WindowSettings
from .window_blocks import at_places, attend_in_blocks, line_of, place_of, slot_of
from .window_triton import DTYPES, HEAD_SIZES, attend_by_kernels


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
    Returns [B, T, H, N], and what is held after the last token. Waits for the device at the first layer's texts alone.
    """
    if texts is None:
        return _attend_real(q_BTHN, k_BTKN, v_BTKN, held, window, token_mask)
    assert held is None, "packed rows start without a state"
    real = torch.ones_like(texts.starts) if token_mask is None else token_mask
    out_BTHN, ends = run_text_by_text(
        lambda q, k, v, mask: _attend_real(q, k, v, None, window, mask), texts, q_BTHN, k_BTKN, v_BTKN, real
    )
    return out_BTHN, HeldWindow(*ends)


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
    written = slots == slot_of(held.seen, window)[:, None]
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
    attend = _by_kernels if has_kernels(v) else attend_in_blocks
    out = attend(q, k, v, held, window)
    if held is None and lengths is None:
        return out, _held_from_start(k, v, window)
    return out, _held_after(k, v, held, window, lengths)


def has_kernels(v_BTKN: torch.Tensor) -> bool:
    """Whether window_triton.py has kernels for such values, and this device runs them."""
    return (
        v_BTKN.device.type == "cuda"
        and triton is not None
        and capability(v_BTKN.device.index) >= OLDEST_CAPABILITY
        and v_BTKN.shape[-1] in HEAD_SIZES
        and kernel_dtype(v_BTKN) in DTYPES
        and not is_exporting()
    )


def _by_kernels(q, k, v, held: HeldWindow | None, window: WindowSettings) -> torch.Tensor:
    dtype = kernel_dtype(v)
    before = (None, None, None) if held is None else (held.keys.to(dtype), held.values.to(dtype), held.seen)
    sizes = {"window_tokens": window.window_tokens, "sink_tokens": window.sink_tokens}
    return attend_by_kernels(*(x.to(dtype) for x in (q, k, v)), *before, **sizes)


def _held_from_start(k, v, window: WindowSettings) -> HeldWindow:
    """What is held after the first tokens of texts without padding: slices, which training pays next to nothing for."""
    B, T = k.shape[:2]
    keys, values = (_first_slots(x.transpose(1, 2), window) for x in (k, v))
    return HeldWindow(keys, values, torch.full((B,), T, dtype=torch.int64, device=k.device))


def _first_slots(x_BKN: torch.Tensor, window: WindowSettings) -> torch.Tensor:
    """The slots [B, K, S + W, N] after the first tokens, [B, K, T, N], of texts."""
    T, W, S = x_BKN.shape[2], window.window_tokens, window.sink_tokens
    if W + S >= T:
        return F.pad(x_BKN, (0, 0, 0, W + S - T))
    newest = x_BKN[:, :, T - W :].roll((T - S) % W, dims=2)  # slices would be of other sizes, another graph, at each T
    return torch.cat([x_BKN[:, :, :S], newest], dim=2)


def _held_after(k, v, held: HeldWindow | None, window: WindowSettings, lengths: torch.Tensor | None) -> HeldWindow:
    """What is held after these tokens, of which the first `lengths` are real."""
    B, T = k.shape[:2]
    seen = k.new_zeros(1, 1, dtype=torch.int64) if held is None else held.seen[:, None]
    rows = seen.expand(B, 1) + (T if lengths is None else lengths[:, None])
    places = place_of(_newest(rows, window), seen, held, window)
    filled = (torch.arange(window.held_tokens, device=k.device) < rows)[:, None, :, None]
    old_keys, old_values = (None, None) if held is None else (held.keys, held.values)
    keys, values = at_places(line_of(k, old_keys), places), at_places(line_of(v, old_values), places)
    return HeldWindow(torch.where(filled, keys, 0), torch.where(filled, values, 0), rows[:, 0])


def _newest(seen: torch.Tensor, window: WindowSettings) -> torch.Tensor:
    """The newest token of each slot, [B, S + W], after `seen` [B, 1]; where none has come, another one."""
    slots = torch.arange(window.held_tokens, device=seen.device)
    return torch.where(slots < window.sink_tokens, slots, seen - 1 - (seen - 1 - slots) % window.window_tokens)
