"""Logits that are not finite: the weights are damaged or overflow, and what the model says from there on means nothing.

Owns the test, the error, and a watch over transformers' generate. Shape letters: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from radlads.model.modeling import RadladsForCausalLM


class NotFinite(ValueError):
    """A model's logits or states are not finite; num_tokens: after how many tokens at the latest.

    The last of them is to blame in a decoded text; a longer piece is computed as a whole.
    """

    def __init__(self, num_tokens: int, what: str = "logits"):
        super().__init__(
            f"the model's {what} are not finite within the first {num_tokens:,} tokens: its weights are damaged or "
            "overflow; copy them anew, or take another checkpoint"
        )


def are_finite(logits_BV: torch.Tensor) -> torch.Tensor:
    """Whether each row is finite, [B], in two kernels and without waiting for the device."""
    return torch.linalg.vector_norm(logits_BV, math.inf, dim=-1) < math.inf


def raise_unless_finite(flags: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Raise NotFinite for the first flag that is False. flags: each with the number of tokens its logits come after."""
    if flags and not torch.stack([flag for _, flag in flags]).all():
        raise NotFinite(next(num_tokens for num_tokens, flag in flags if not flag))


class FiniteWatch:
    """Watches a model that transformers' generate runs. As a context, or by close(), it leaves the model as it was.

    Rows of logits that are not finite become zeros, since torch.multinomial would end a CUDA context over them; their
    flags stay on the device until check() reads them.
    """

    def __init__(self, model: RadladsForCausalLM):
        self._flags: list[tuple[int, torch.Tensor]] = []
        self._hook = model.register_forward_hook(self._note)

    def check(self) -> None:
        """Raise NotFinite if any logits since the last check were not finite, for the first of them."""
        flags, self._flags = self._flags, []
        raise_unless_finite(flags)

    def close(self) -> None:
        self._hook.remove()

    def __enter__(self) -> "FiniteWatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _note(self, model: RadladsForCausalLM, arguments: Any, output: Any) -> None:
        finite_B = are_finite(output.logits[:, -1])
        cache = output.past_key_values
        num_tokens = output.logits.shape[1] if cache is None else cache.get_seq_length()
        self._flags.append((num_tokens, finite_B.all()))
        output.logits[:, -1].masked_fill_(~finite_B[:, None], 0.0)
