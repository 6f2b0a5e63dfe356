"""AdamW for bf16 parameters on a GPU: one pass over memory, and stochastic rounding. Imports triton.

A bf16 number has 8 bits: an update below half a unit of the last, 2^-9 of the weight, would be lost every time if
rounded to the nearest. Rounded up with a probability equal to the share it covers, it arrives on average (arXiv
2010.06192).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "num_values"])
def _adamw(
    parameter_ptr,
    gradient_ptr,
    mean_ptr,
    square_ptr,
    step_ptr,
    scale_ptr,
    finite_ptr,
    num_values,
    seed,
    lr,
    log_beta1,
    log_beta2,
    eps,
    decay,
    BLOCK: tl.constexpr,
):
    if tl.load(finite_ptr) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    step = tl.load(step_ptr)
    beta1, beta2 = tl.exp(log_beta1), tl.exp(log_beta2)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(square_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient * gradient
    tl.store(mean_ptr + at, mean.to(tl.bfloat16), mask=inside)
    tl.store(square_ptr + at, square.to(tl.bfloat16), mask=inside)
    corrected = tl.sqrt(square / (1 - tl.exp(log_beta2 * step))) + eps
    parameter = tl.load(parameter_ptr + at, mask=inside, other=0.0).to(tl.float32)
    parameter = parameter * (1 - lr * decay) - lr / (1 - tl.exp(log_beta1 * step)) * mean / corrected
    # The finaliser of MurmurHash3 turns the value's number into 16 random bits, added below bf16's last bit
    noise = at.to(tl.uint32) * 2654435761 + seed
    noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
    noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
    bits = parameter.to(tl.uint32, bitcast=True) + ((noise ^ (noise >> 16)) & 0xFFFF)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    tl.store(parameter_ptr + at, rounded, mask=inside)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose parameters, gradients and moments are bf16, and whose arithmetic is fp32.

    Moments are rounded to the nearest, parameters stochastically, with the same noise for the same `seed` and step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        for group in self.param_groups:
            device = group["params"][0].device
            group["step"] = torch.zeros((), dtype=torch.float32, device=device)
            group["steps_tried"] = 0

    @torch.no_grad()
    def step_scaled(self, scale: torch.Tensor, finite: torch.Tensor) -> None:
        """A step with the gradients times `scale`, or nothing at all unless `finite`; both scalars on the device."""
        finite = finite.to(torch.int32)
        for group in self.param_groups:
            group["step"] += finite
            group["steps_tried"] += 1
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(group, number, parameter, scale, finite)

    def step(self, closure=None) -> None:  # type: ignore[override]
        """A plain step."""
        device = self.param_groups[0]["step"].device
        self.step_scaled(torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device))

    def _update(self, group, number: int, parameter: torch.Tensor, scale: torch.Tensor, finite: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None and parameter.is_contiguous() and parameter.dtype == torch.bfloat16
        log_beta1, log_beta2 = (math.log(beta) for beta in group["betas"])
        _adamw[(triton.cdiv(parameter.numel(), BLOCK),)](
            parameter,
            parameter.grad.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            group["step"],
            scale,
            finite,
            parameter.numel(),
            hash((group["seed"], group["steps_tried"], number)) & 0x7FFFFFFF,
            group["lr"],
            log_beta1,
            log_beta2,
            group["eps"],
            group["weight_decay"],
            BLOCK=BLOCK,
            num_warps=8,
        )
