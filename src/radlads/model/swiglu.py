"""The channel mixer of Qwen2, Qwen3 and Llama.

Shape letters: B batch, T tokens, C hidden size, F intermediate size.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .exporting import is_exporting

if TYPE_CHECKING:
    from .configuration import RadladsConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases. Training keeps gate(x) and up(x) and computes their product again."""

    def __init__(self, config: "RadladsConfig", layer_idx: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, C] to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        # An exported graph would keep the product's value and lose its gradient
        if not torch.is_grad_enabled() or not _is_plain(self.down_proj) or is_exporting():
            return self.down_proj(F.silu(gate) * up)
        return _GatedDown.apply(gate, up, self.down_proj.weight.to(gate.dtype))


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does no more than multiply: not if it is another class (quantised, adapted), is hooked,
    or has been given another forward (weights kept elsewhere)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not hooks and "forward" not in vars(layer)


class _GatedDown(torch.autograd.Function):
    """(silu(gate) * up) @ weight^T for gate and up [B, T, F], weight [C, F]; the product before it is not kept."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        gate, up, weight = ctx.saved_tensors
        d_y = d_y.to(weight.dtype)
        d_weight = None
        sigmoid = torch.sigmoid(gate.float())
        if ctx.needs_input_grad[2]:
            # Not in forward's order: torch.compile would find the common product, and keep it after all
            product = (gate * (sigmoid * up)).to(weight.dtype)
            d_weight = d_y.flatten(0, -2).mT @ product.flatten(0, -2)
        d_product = d_y @ weight
        silu = gate * sigmoid
        d_gate = d_product * up * (sigmoid + silu * (1 - sigmoid))
        return d_gate.to(gate.dtype), (d_product * silu).to(up.dtype), d_weight
