"""What DeepSpeed holds of a student and its optimiser, by the names that a checkpoint has for it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from radlads.checkpoint.weights import StoredWeights, TensorInfo
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import whole_shape
from radlads.train.engines.rows import HostRows


class FullWeights(StoredWeights):
    """A student's fp32 weights by name, on the CPU; all processes have to ask for each, in the same order."""

    def __init__(
        self, student: RadladsForCausalLM, own: Mapping[str, torch.nn.Parameter], frozen: Mapping[str, HostRows]
    ):
        self._names = [name for name, _ in student.named_parameters()]
        self._own, self._frozen = own, frozen

    def gathered(self, name: str) -> torch.Tensor:
        """The weight where the engine has it, or on the device."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._frozen[name].gathered() if name in self._frozen else safe_get_full_fp32_param(self._own[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.gathered(name).cpu()

    def info(self, name: str) -> TensorInfo:
        shape = self._frozen[name].shape if name in self._frozen else whole_shape(self._own[name])
        return TensorInfo(tuple(shape), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Moments(StoredWeights):
    """The state of DeepSpeed's optimiser by the names that each parameter's would have, as FullWeights are read.

    states: names of parameters, and the state that is one of a part of them all.
    """

    def __init__(self, own: Mapping[str, torch.nn.Parameter], states: list[tuple[list[str], Mapping[str, Any]]]):
        self._own = own
        self._keys: dict[str, tuple[str, str, torch.Tensor]] = {}
        for names, state in states:
            tensors = {key: each for key, each in state.items() if isinstance(each, torch.Tensor)}
            for key, tensor in tensors.items():
                kept = torch.empty(0) if tensor.ndim else tensor
                self._keys |= {f"optimizer_0.{name}:{key}": (name, key, kept) for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter, key, scalar = self._keys[name]
        found = safe_get_full_optimizer_state(self._own[parameter], key) if scalar.ndim else scalar
        return found.detach().cpu()

    def info(self, name: str) -> TensorInfo:
        parameter, _, scalar = self._keys[name]
        return TensorInfo(tuple(whole_shape(self._own[parameter] if scalar.ndim else scalar)), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
