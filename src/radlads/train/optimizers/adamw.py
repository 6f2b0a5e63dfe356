"""AdamW that updates large bf16 matrices on a GPU by a kernel of its own, at the speed of the memory.

torch's fused kernel, which does the same arithmetic and is used for all other parameters, reaches half of that.
"""

from __future__ import annotations

from typing import Any

import torch

from radlads.model.chunked_kernels import jit, triton

if triton is not None:
    import triton.language as tl

BLOCK = 4096
# Smaller tensors are more quickly updated many at a time, as torch does
LARGE = 2**20
# The first with bf16
OLDEST_CAPABILITY = (8, 0)


@jit
def _adamw(
    parameter_ptr, gradient_ptr, mean_ptr, square_ptr, step_ptr, grad_scale_ptr, found_inf_ptr,
    lr, beta1, beta2, rest1, rest2, eps, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step on BLOCK values; grad_scale divides the gradients, and found_inf = 1 leaves all as it is."""
    if tl.load(found_inf_ptr) != 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(step_ptr)
    gradient = tl.load(gradient_ptr + at).to(tl.float32) / tl.load(grad_scale_ptr)
    mean = tl.load(mean_ptr + at).to(tl.float32)
    square = tl.load(square_ptr + at).to(tl.float32)
    parameter = tl.load(parameter_ptr + at).to(tl.float32)
    parameter -= lr * decay * parameter
    mean += rest1 * (gradient - mean)
    square = beta2 * square + rest2 * gradient * gradient
    corrected = tl.sqrt(square) / tl.sqrt(1 - tl.exp(step * tl.log(beta2))) + eps
    parameter -= lr / (1 - tl.exp(step * tl.log(beta1))) * mean / corrected
    tl.store(mean_ptr + at, mean.to(tl.bfloat16))
    tl.store(square_ptr + at, square.to(tl.bfloat16))
    tl.store(parameter_ptr + at, parameter.to(tl.bfloat16))


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (arXiv 1711.05101), with the same state, and the same results but for their last bit.

    grad_scale, found_inf: scalar tensors on the device as torch's fused kernel knows them; gradients are divided by the
    one, and nothing changes where the other is 1.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        """See torch.optim.AdamW."""
        assert closure is None
        large = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and _fits(parameter, parameter.grad)
        ]
        for parameter, _, _ in large:
            parameter.grad = None  # hides it from torch's kernel
        super().step()
        if large:
            self._step_large(large)
        for parameter, gradient, _ in large:
            parameter.grad = gradient

    def _step_large(self, large: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]) -> None:
        device = large[0][0].device
        grad_scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        for parameter, _, _ in large:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=device), **moments}
        torch._foreach_add_([self.state[parameter]["step"] for parameter, _, _ in large], 1 - found_inf)
        for parameter, gradient, group in large:
            update_(parameter, gradient, self.state[parameter], group, grad_scale=grad_scale, found_inf=found_inf)


def update_(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
    *,
    grad_scale: torch.Tensor,
    found_inf: torch.Tensor,
) -> None:
    """The step number state["step"] of one bf16 parameter, of a multiple of BLOCK numbers, by the kernel."""
    beta1, beta2 = group["betas"]
    _adamw[(parameter.numel() // BLOCK,)](
        parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], grad_scale, found_inf,
        group["lr"], beta1, beta2, 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"],
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _fits(parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether the kernel takes this parameter."""
    return (
        parameter.is_cuda
        and triton is not None
        and torch.cuda.get_device_capability(parameter.device) >= OLDEST_CAPABILITY
        and parameter.dtype == gradient.dtype == torch.bfloat16
        and parameter.numel() >= LARGE
        and parameter.numel() % BLOCK == 0
        and parameter.is_contiguous()
        and gradient.is_contiguous()
    )
