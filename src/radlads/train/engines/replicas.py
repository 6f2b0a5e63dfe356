"""Gradients of a model that every process holds whole: added up over the processes, while backward still runs.

What torch's DistributedDataParallel does, for a loss that comes in parts: in a micro-batch every parameter gets its
gradient once, in whichever backward pass it is, and may be on its way from then on.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from radlads.train.processes.group import Processes

# Smaller gradients travel together: below this a collective takes as long as the wire needs for nothing
LARGE_NUMBERS = 2**20


class GradientSums:
    """Adds up the gradients of parameters, given by name, over the processes."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], processes: Processes):
        self._parameters, self._processes = parameters, processes
        self._large = [name for name, parameter in parameters.items() if parameter.numel() >= LARGE_NUMBERS]
        # All processes have to start in one order. It is the one in which the first process's were complete once.
        self._order: list[str] | None = None
        self._complete: dict[str, None] = {}
        self._started: list[str] = []
        self._works: list[dist.Work] = []
        self._hooks: list[RemovableHandle] = []

    def begin_last(self) -> None:
        """A micro-batch begins that is its window's last, and gives every parameter its gradient once."""
        self._hooks = [
            self._parameters[name].register_post_accumulate_grad_hook(self._hook(name)) for name in self._large
        ]

    def finish(self) -> None:
        """Make every gradient the sum over all processes."""
        if self._hooks and self._order is None:
            order = self._processes.from_first(lambda: list(self._complete))
            self._order = [*order, *(name for name in self._large if name not in order)]
        for name in (self._order or self._large)[len(self._started) :]:
            self._start(name)
        self._add_small()
        for work in self._works:
            work.wait()
        for hook in self._hooks:
            hook.remove()
        self._complete, self._started, self._works, self._hooks = {}, [], [], []

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def note(parameter: torch.Tensor) -> None:
            if name in self._complete:
                raise ValueError(
                    f"{name} got a gradient from two parts of the loss, as where layers share it: train on one device"
                )
            self._complete[name] = None
            order = self._order or []
            while len(self._started) < len(order) and order[len(self._started)] in self._complete:
                self._start(order[len(self._started)])

        return note

    def _start(self, name: str) -> None:
        self._started.append(name)
        if (gradient := self._parameters[name].grad) is not None:
            self._works.append(dist.all_reduce(gradient, async_op=True))

    def _add_small(self) -> None:
        large = set(self._large)
        small = [each.grad for name, each in self._parameters.items() if name not in large and each.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in small):
            own = [gradient for gradient in small if gradient.dtype == dtype]
            together = torch.cat([gradient.flatten() for gradient in own])
            dist.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in own])
            torch._foreach_copy_(own, [part.view_as(each) for part, each in zip(parts, own, strict=True)])
