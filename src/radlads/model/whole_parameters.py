"""Reading parameters that FSDP2 may keep in shards. Where a module is not sharded, nothing happens here.

FSDP2 gathers a module's parameters in hooks of its call, which code that reads them past that call has to stand in for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


def call_whole(module: nn.Module, function: Callable, *args: Any) -> Any:
    """function(module, *args) with the module's own parameters whole, in the backward pass too.

    Gradients come through tensors in what it returns; they are reduced and sharded again as after the module's call.
    """
    if not isinstance(module, FSDPModule):
        return function(module, *args)
    if "run_whole" not in vars(module):
        module.run_whole = MethodType(lambda self, run, *rest: run(self, *rest), module)  # type: ignore[assignment]
        register_fsdp_forward_method(module, "run_whole")
    return module.run_whole(function, *args)  # type: ignore[operator]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's own parameters whole while the block lasts; for what needs no gradients."""
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
