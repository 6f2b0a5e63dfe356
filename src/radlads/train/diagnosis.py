"""Which tensor was the first to be NaN or infinite, found by running a step's batches once more."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves

from radlads.checkpoint.weights import own_part
from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import announce_backward
from radlads.train.engines.engine import Engine


def explained(
    fault: str,
    stage: Stage,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    batches: Iterable[torch.Tensor],
    engine: Engine,
) -> str:
    """The fault of a step with these batches, which tensor was the first that is not finite, and what to do.

    All processes have to call it; the student makes no further step.
    """
    student.compile_blocks(False)
    engine.release_hooks()
    processes = engine.processes
    own = first_not_finite(stage, student, teacher, batches, whole=processes.size > 1, own_values=engine.own_values)
    found = processes.gather(own)
    first = next((each for each in found if each.startswith("and")), found[0])
    remedy = "lower the learning rate, or look for NaN in the weights the stage started from"
    return f"{fault}, {first}: {remedy}"


def first_not_finite(
    stage: Stage,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    batches: Iterable[torch.Tensor],
    *,
    whole: bool = False,
    own_values: Callable[[torch.Tensor], torch.Tensor] = own_part,
) -> str:
    """A phrase that names it, in the order of computing: weights, then what modules put out, then gradients.

    The models run as they are, forward and backward on each batch [B, T + 1], not compiled; the student is left without
    gradients. whole: run all batches to their ends whatever is found, as processes do that gather for each other.
    own_values: what this process holds of a parameter.
    """
    weights = (name for name, each in student.named_parameters() if not torch.isfinite(own_values(each)).all())
    if (weight := next(weights, None)) is not None and not whole:
        return f"and the first tensor that is not finite is the weight {weight}"
    student.zero_grad(set_to_none=True)
    with _watched(student, teacher) as found:
        if weight is not None:
            found.append(f"the weight {weight}")
        try:
            for tokens in batches:
                for part in stage.parts(student, teacher, tokens):
                    if part.objective is not None:
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
