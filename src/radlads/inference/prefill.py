"""Reading prompts: in pieces, and several of any lengths at a time. Shape letters: B rows, T tokens, V vocabulary."""

from collections.abc import Sequence

import torch

from radlads.inference.finite import are_finite, raise_unless_finite
from radlads.model.cache import RadladsCache
from radlads.model.modeling import RadladsForCausalLM

PREFILL_TOKENS = 2048


@torch.inference_mode()
def prefill(
    model: RadladsForCausalLM,
    tokens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    piece: int = PREFILL_TOKENS,
    cache: RadladsCache | None = None,
) -> tuple[torch.Tensor, RadladsCache]:
    """Read tokens [B, T] in pieces; the logits [B, V] after the last one, and the cache.

    mask: [B, T], 0 at padding. cache: the state of what was read before, which is brought up to date in place. Raises
    NotFinite, after the whole text, for logits at the end of a piece that are not finite.
    """
    cache = RadladsCache(model.config) if cache is None else cache
    masks = [None] * -(-tokens.shape[1] // piece) if mask is None else mask.split(piece, dim=1)
    num_tokens, flags = cache.get_seq_length(), []
    for part, part_mask in zip(tokens.split(piece, dim=1), masks, strict=True):
        logits = model(part, part_mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        num_tokens += part.shape[1]
        flags.append((num_tokens, are_finite(logits).all()))
    raise_unless_finite(flags)
    return logits, cache


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as [B, T] tokens that end together, and a mask, False at padding; None where all are equally long.

    Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("the prompt is empty: give at least one token to continue")
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens, None
    return tokens, torch.arange(longest, device=device) >= longest - lengths[:, None]
