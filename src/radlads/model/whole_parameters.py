"""Reading parameters that are kept in parts by several processes. Where a module's are whole, nothing happens here.

FSDP2 gathers a module's parameters in hooks of its call, which code that reads them past that call has to stand in for.
Parameters that DeepSpeed's ZeRO-3 has partitioned are gathered here (`Turns`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils._pytree import tree_leaves


class Turns:
    """Parts of a model that are whole in turn: from when one begins to run, forward or backward, until another does.

    One at a time is enough, since autograd takes parts in the reverse of their order, and none up again.
    called: parts that are run by calling them. read: those that only call_whole runs, inside called ones or not.
    gather: for parameters, a context in which they are whole; entered and left by all processes in the same order.
    """

    def __init__(
        self,
        called: Iterable[nn.Module],
        read: Iterable[nn.Module],
        gather: Callable[[list[nn.Parameter]], AbstractContextManager],
    ):
        self._gather, self._gathered = gather, ExitStack()
        self._current: nn.Module | None = None
        called = list(called)
        self._parts = [*called, *read]
        for part in self._parts:
            part.turns = self  # type: ignore[assignment]
        self._hooks = [part.register_forward_pre_hook(lambda part, _: self.begin(part)) for part in called]
        self._hooks += [part.register_forward_hook(self.begin_again_before_backward) for part in called]

    def begin(self, part: nn.Module) -> None:
        """Make the part whole, and the one before it no longer."""
        if part is not self._current:
            self.end()
            self._gathered.enter_context(self._gather(list(part.parameters())))
            self._current = part

    def begin_again_before_backward(self, part: nn.Module, inputs: Any, outputs: Any) -> None:
        """Have the backward pass through these outputs of the part begin by making it whole."""
        # What is handed through has its gradient only once all parts behind this one are done
        handed_through = {id(each) for each in tree_leaves(inputs)}
        for each in tree_leaves(outputs):
            if isinstance(each, torch.Tensor) and each.requires_grad and id(each) not in handed_through:
                each.register_hook(lambda _: self.begin(part))

    def end(self) -> None:
        """Leave no part whole."""
        self._current = None
        self._gathered.close()

    def let_go(self) -> None:
        """Let the parts run as they did before, whatever their parameters are."""
        self.end()
        for hook in self._hooks:
            hook.remove()
        for part in self._parts:
            del part.turns


def call_whole(module: nn.Module, function: Callable, *args: Any, backward_follows: bool = True) -> Any:
    """function(module, *args) with the module's own parameters whole, in the backward pass too.

    Gradients come through tensors in what it returns; they are reduced and sharded again as after the module's call.
    backward_follows: whether that pass, if there is one, is the next thing to run, so that parameters stay until then.
    """
    if (turns := turns_of(module)) is not None:
        turns.begin(module)
        outputs = function(module, *args)
        turns.begin_again_before_backward(module, args, outputs)
        return outputs
    if not isinstance(module, FSDPModule):
        return function(module, *args)
    if "run_whole" not in vars(module):
        module.run_whole = MethodType(lambda self, run, *rest: run(self, *rest), module)  # type: ignore[assignment]
        register_fsdp_forward_method(module, "run_whole")
    module.set_reshard_after_forward(not (backward_follows and torch.is_grad_enabled()), recurse=False)
    try:
        return module.run_whole(function, *args)  # type: ignore[operator]
    finally:
        module.set_reshard_after_forward(True, recurse=False)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's own parameters whole while the block lasts; for what needs no gradients."""
    if (turns := turns_of(module)) is not None:
        turns.begin(module)
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def begin_gathering(module: nn.Module) -> None:
    """Have the parameters on their way, for whole() to find them there."""
    if isinstance(module, FSDPModule):
        module.unshard(async_op=True)


def announce_backward(model: nn.Module, *, is_last: bool) -> None:
    """Say of the next backward pass whether it is a batch's last. If not, gradients may still be on their way after it,
    and be reduced while the next part of the loss is computed."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(is_last)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter while it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def turns_of(module: nn.Module) -> Turns | None:
    """What gathers the parameters of a part of a partitioned model; None for any other module."""
    return vars(module).get("turns")
