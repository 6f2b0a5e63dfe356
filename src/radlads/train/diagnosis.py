"""Which tensor was the first to be NaN or infinite, found by running a step's batches once more."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from radlads.checkpoint.weights import own_part
from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import announce_backward


def first_not_finite(
    stage: Stage,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    batches: Iterable[torch.Tensor],
    *,
    whole: bool = False,
) -> str:
    """A phrase that names it, in the order of computing: weights, then what modules put out, then gradients.

    The models run as they are, forward and backward on each batch [B, T + 1], not compiled; the student is left without
    gradients. whole: run all batches to their ends whatever is found, as processes do that gather for each other.
    """
    weights = (name for name, each in student.named_parameters() if not torch.isfinite(_held(each)).all())
    if (weight := next(weights, None)) is not None and not whole:
        return f"and the first tensor that is not finite is the weight {weight}"
    student.zero_grad(set_to_none=True)
    with _watched(student, teacher) as found:
        if weight is not None:
            found.append(f"the weight {weight}")
        try:
            for tokens in batches:
                for part in stage.parts(student, teacher, tokens):
                    announce_backward(student.model, is_last=True)
                    part.objective.backward()
                    if not found and not torch.isfinite(part.sum):
                        found.append(f"the loss {part.name} itself")
                if found and not whole:
                    break
        except torch.OutOfMemoryError:
            return "and there was no memory left to look for the first tensor that is not finite"
    student.zero_grad(set_to_none=True)
    if found:
        return f"and the first tensor that is not finite is {found[0]}"
    return "though no tensor was when the batch was computed again"


@contextmanager
def _watched(student: RadladsForCausalLM, teacher: RadladsForCausalLM | None) -> Iterator[list[str]]:
    """The names of tensors that are not finite, as they appear while the block runs the models."""
    found: list[str] = []
    models = {"": student} if teacher is None else {"the teacher's ": teacher, "": student}
    handles = []
    for owner, model in models.items():
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(_output_hook(f"the output of {owner}{name or 'model'}", found)))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_gradient_hook(name, found)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _held(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter; DeepSpeed keeps a partitioned one's numbers beside it, filled up."""
    if parameter.numel() or not hasattr(parameter, "ds_tensor"):
        return own_part(parameter)
    own = parameter.ds_tensor
    return own[: max(0, parameter.ds_numel - dist.get_rank() * own.numel())]  # type: ignore[attr-defined]


def _output_hook(what: str, found: list[str]):
    def look(module, inputs, output) -> None:
        if not found and not all(map(_is_finite, tree_leaves(output))):
            found.append(what)

    return look


def _gradient_hook(name: str, found: list[str]):
    def look(parameter: torch.Tensor) -> None:
        if not found and not _is_finite(parameter.grad):
            found.append(f"the gradient of {name}")
        parameter.grad = None  # of a model in shards, all of them together might not fit

    return look


def _is_finite(leaf: object) -> bool:
    return not isinstance(leaf, torch.Tensor) or bool(torch.isfinite(own_part(leaf)).all())
