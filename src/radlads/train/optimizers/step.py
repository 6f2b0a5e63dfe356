"""One optimiser step without waiting for the GPU: backward part by part, then clip, update and zero.

What a step puts out, loss sums and gradient norm, comes to the host while the GPU goes on (`Readout`). Whether they are
finite is decided on the device: a step that is not changes no weight, however late the host learns of it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import announce_backward


class PartSum(NamedTuple):
    """A part of the loss after its backward. sum: scalar tensor without graph, on the device. count: what to divide
    sums by."""

    name: str
    sum: torch.Tensor
    count: int  # type: ignore[assignment]  # a tuple's own count() is of no use here


def backward_parts(
    stage: Stage,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    tokens: torch.Tensor,
    *,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> list[PartSum]:
    """Add the gradients of the stage's loss over tokens [B, T + 1], a sum, to the student's, one part after another."""
    sums = []
    for part in stage.parts(student, teacher, tokens):
        if part.objective is not None:
            announce_backward(student.model, is_last=part.is_last)
            backward(part.objective)
        sums.append(PartSum(part.name, part.sum, part.count))
        del part  # or its graph would live until the next one is built
    return sums


class GradientNorms(NamedTuple):
    """Of the whole gradient, and of its part for the parameters of each role: scalar fp32 tensors on the device."""

    whole: torch.Tensor
    by_role: dict[str, torch.Tensor]


@torch.no_grad()
def optimizer_step(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Iterable[torch.nn.Parameter],
    *,
    count: int | torch.Tensor,
    clip_val: float,
    sums: torch.Tensor | None = None,
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None,
    leave_out: torch.Tensor | None = None,
) -> GradientNorms:
    """Divide the gradients of sums by `count`, clip them to the norm `clip_val` (0: as they are), update, and zero.

    add_up: adds a tensor up, in place, over the processes that have the other rows of the parameters.
    Returns the norms before clipping, of the mean's gradient. If the whole one, or any of the loss `sums`, is not
    finite, or `leave_out` (a boolean on the device) is true, no weight and no optimiser state changes, and the
    gradients are zeroed all the same.
    """
    gradients = {p: p.grad for p in parameters if p.grad is not None}
    each = torch._foreach_norm(list(gradients.values()), 2, dtype=torch.float32)
    norms = [norm.to(each[0].device) for norm in each]
    roles = dict(_by_role(gradients, norms, optimizers))
    of_all = torch.stack([torch.linalg.vector_norm(torch.stack(own)) for own in (norms, *roles.values())])
    if add_up is not None:
        of_all = add_up(of_all.square()).sqrt()
    norm, *of_roles = (of_all / count).unbind()
    by_role = dict(zip(roles, of_roles, strict=True))
    shrink = (clip_val / (norm + 1e-6)).clamp(max=1.0) if clip_val else torch.ones_like(norm)
    finite = torch.isfinite(norm)
    if sums is not None:
        finite = finite & torch.isfinite(sums).all()
    if leave_out is not None:
        finite = finite & ~leave_out
    for optimizer in optimizers:
        _update(optimizer, scale=shrink / count, finite=finite)
        optimizer.zero_grad()  # sets them to None; DeepSpeed's takes no argument
    return GradientNorms(norm, by_role)


def _by_role(
    parameters: Iterable[torch.nn.Parameter], norms: Iterable[torch.Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> list[tuple[str, list[torch.Tensor]]]:
    """The norms of the parameters of each role, sorted by role; none where the optimisers' groups have no roles."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "role" in group]
    roles = {parameter: group["role"] for group in groups for parameter in group["params"]}
    found: dict[str, list[torch.Tensor]] = {}
    for parameter, norm in zip(parameters, norms, strict=True):
        if parameter in roles:
            found.setdefault(roles[parameter], []).append(norm)
    return sorted(found.items())


def _update(optimizer: torch.optim.Optimizer, *, scale: torch.Tensor, finite: torch.Tensor) -> None:
    """Step with gradients times `scale`, if `finite`."""
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"] and scale.device.type != "mps":
        # The kernel itself divides by grad_scale, and does nothing where found_inf is 1 (both are there for GradScaler)
        optimizer.grad_scale, optimizer.found_inf = scale.reciprocal(), (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif finite:  # waits for the GPU, which others than the fused kernel cannot do without
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        optimizer.step()


class Readout:
    """A tensor of numbers on its way to the host. Making one costs no wait; `values` waits until it has arrived."""

    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers.detach().to("cpu", non_blocking=numbers.is_cuda)
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def values(self) -> list[float]:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
