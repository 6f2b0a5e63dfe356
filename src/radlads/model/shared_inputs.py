"""What the tokens of a call share: masks, positions, RoPE tables, and where rows hold several texts.

Shape letters: B batch, T new tokens, S all tokens so far.
"""

import torch

from .configuration import RadladsConfig
from .contracts import SharedInputs
from .exporting import is_exporting
from .layers import rope_tables
from .packed_rows import find_texts


def shared_inputs(
    config: RadladsConfig, hidden, attention_mask, position_ids, past_key_values, cu_seq_lens, seq_idx
) -> SharedInputs:
    """Masks, RoPE tables and texts of these new tokens; advances the cache's positions."""
    B, T, _ = hidden.shape
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    earlier = None if past_key_values is None else past_key_values.padding_mask
    padded = _padding_mask(attention_mask, earlier, past, hidden)
    token_mask = None if padded is None or is_all_true(padded[:, -T:]) else padded[:, -T:]
    if past and (cu_seq_lens is not None or seq_idx is not None):
        raise ValueError("cu_seq_lens_q and seq_idx are for packed rows, which need an empty cache: leave them out")
    # Single tokens are most of generation, and an exported graph cannot depend on what its inputs hold
    can_be_packed = past == 0 and T > 1 and not is_exporting()
    texts = find_texts(hidden, token_mask, position_ids, cu_seq_lens, seq_idx) if can_be_packed else None
    if position_ids is None:
        position_ids = _positions(token_mask, past_key_values, past, hidden)
        position_ids = position_ids if texts is None else texts.positions_in_text(position_ids)
    softmax_mask = _softmax_mask(config, padded, past, T, hidden.device, texts)
    if texts is not None:
        padded = texts.in_last_text() if padded is None else padded & texts.in_last_text()
    if past_key_values is not None:
        past_key_values.next_positions = (position_ids[:, -1] + 1).expand(B).clone()
        past_key_values.padding_mask = padded if "full_attention" in config.layer_types else None
    cos, sin = rope_tables(config, position_ids)
    return SharedInputs(cos, sin, token_mask, softmax_mask, texts)


def _padding_mask(attention_mask, earlier, past: int, hidden) -> torch.Tensor | None:
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
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, but there are {past} cached and {T} new ones")
    return None if is_all_true(mask) else mask


def _positions(token_mask, past_key_values, past: int, hidden) -> torch.Tensor:
    """Positions [B or 1, T] that count real tokens only, continuing the cache's; a pad has the last token's."""
    T, device = hidden.shape[1], hidden.device
    if token_mask is None:
        steps = torch.arange(T, device=device).unsqueeze(0)
    else:
        steps = token_mask.long().cumsum(-1) - 1
    if past and past_key_values.next_positions is not None:
        return steps + past_key_values.next_positions.unsqueeze(1).to(device)
    return steps + past


def _softmax_mask(
    config: RadladsConfig, padded: torch.Tensor | None, past: int, T: int, device, texts
) -> torch.Tensor | None:
    """Boolean [B or 1, 1, T, S] for softmax layers; None where plain causal attention is meant."""
    is_plain = padded is None and texts is None and (past == 0 or T == 1)
    if "full_attention" not in config.layer_types or is_plain:
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


def is_all_true(mask: torch.Tensor) -> bool:
    """True if all of a mask is True; False in an exported graph, which must fit every mask. Waits for the device."""
    return not is_exporting() and bool(mask.all())
