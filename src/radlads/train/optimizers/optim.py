"""Optimisers by name, their two parameter groups (mixer, rest), and the learning rate as a function of the step."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import is_attention_parameter
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import whole_shape
from radlads.train.optimizers.adamw import AdamW

Groups = list[dict[str, Any]]


def build_optimizers(
    student: RadladsForCausalLM, train: TrainConfig, own_parts: Mapping[str, torch.nn.Parameter] | None = None
) -> list[torch.optim.Optimizer]:
    """Optimisers over the parameters that require gradients; every group has a "role", "mixer" or "rest".

    mixer: every layer's time mixer, a softmax one that is kept too, as in the released code. own_parts: what to update
    in their stead, by name (see own_parts.py).

    adamw: AdamW for all, weight decay on mixers and on matrices. muon: Muon for the blocks' matrices (beta2 is its
    momentum, and its updates are scaled to AdamW's size, so that rates mean the same), AdamW for embedding, head and
    vectors. The others for all, each from its own package. Raises ValueError if nothing trains, or the package or GPU
    that an optimiser needs is not there.
    """
    by_muon: dict[str, list[torch.nn.Parameter]] = {}
    # Matrices apart from the rest of the mixers too: checkpoints have their groups in this order
    by_adam: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "mixer" if is_attention_parameter(name) else "rest"
        updated, num_axes = parameter if own_parts is None else own_parts[name], len(whole_shape(parameter))
        if train.optimizer == "muon" and num_axes == 2 and ".layers." in name:
            by_muon.setdefault(role, []).append(updated)
        else:
            by_adam.setdefault((role, num_axes == 2), []).append(updated)
    if not by_muon and not by_adam:
        raise ValueError("no parameter trains: the student has no recurrent layer, or train.trainable leaves none")
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        muon = [{"params": parameters, "role": role} for role, parameters in by_muon.items()]
        momentum, decay = train.beta2, train.weight_decay
        optimizers.append(
            torch.optim.Muon(muon, train.lr_init, decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        )
    if by_adam:
        adam = [
            {"params": parameters, "role": role, "weight_decay": train.weight_decay * (matrices or role == "mixer")}
            for (role, matrices), parameters in by_adam.items()
        ]
        optimizers.append(_ADAMS[train.optimizer](adam, train))
    return optimizers


def _adamw(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    return AdamW(groups, train.lr_init, (train.beta1, train.beta2), train.adam_eps, fused=True)


def _schedule_free(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    rule = _from_package(train, "schedulefree", "schedulefree", "AdamWScheduleFree")
    optimizer = rule(groups, train.lr_init, (train.beta1, train.beta2), train.adam_eps)
    optimizer.train()
    return optimizer


def _lion(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    rule = _from_package(train, "lion-pytorch", "lion_pytorch", "Lion")
    return rule(groups, train.lr_init, (train.beta1, train.beta2))


def _adam_8bit(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    _check_on_gpu(groups, train)
    rule = _from_package(train, "bitsandbytes", "bitsandbytes.optim", "AdamW8bit")
    return rule(groups, train.lr_init, (train.beta1, train.beta2), train.adam_eps)


def _deepspeed_fused(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    _check_on_gpu(groups, train)
    rule = _from_package(train, "deepspeed", "deepspeed.ops.adam", "FusedAdam")
    try:
        return rule(groups, train.lr_init, betas=(train.beta1, train.beta2), eps=train.adam_eps, adam_w_mode=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever building its extension comes upon
        raise ValueError(
            f"train.optimizer {train.optimizer!r} is a CUDA extension that DeepSpeed builds at first use, which failed "
            f"here ({error}): have nvcc on the path and TORCH_CUDA_ARCH_LIST unset, or use adamw, which is fused too"
        ) from error


_ADAMS: dict[str, Callable[[Groups, TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _adamw,
    "adamwschedulefree": _schedule_free,
    "lion": _lion,
    "adam8bit": _adam_8bit,
    "dsfusedadamw": _deepspeed_fused,
}


def _from_package(train: TrainConfig, package: str, module: str, name: str) -> Callable[..., Any]:
    """The optimiser's class. Raises ValueError with the pip command if its package is not installed."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"train.optimizer {train.optimizer!r} needs {package}, which is not installed: pip install {package}, or "
            "use adamw"
        ) from error
    return getattr(found, name)


def _check_on_gpu(groups: Groups, train: TrainConfig) -> None:
    if groups[0]["params"][0].device.type != "cuda":
        raise ValueError(f"train.optimizer {train.optimizer!r} needs a CUDA GPU: use adamw")


@contextmanager
def weights_to_keep(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """While open, the parameters are what to measure and to save: schedule-free optimisers train at other points than
    the average that they are about."""
    averaging: list[Any] = [
        each for each in optimizers if each.__class__.__module__.partition(".")[0] == "schedulefree"
    ]
    for optimizer in averaging:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in averaging:
            optimizer.train()


def set_learning_rates(optimizer: torch.optim.Optimizer, train: TrainConfig, step: int, num_steps: int) -> None:
    """Give each group its rate for optimiser step `step` (from 0) of `num_steps`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(train, step, num_steps, role=group["role"])


def learning_rate(train: TrainConfig, step: int, num_steps: int, *, role: str) -> float:
    """The rate of a group ("mixer" or "rest") at a step: linear warm-up from 1 %, then a decay between the fractions
    lr_wait and lr_endpoint of the remaining steps, flat before and after."""
    first, last = train.lr_init, train.lr_final
    if role == "mixer":
        first = train.lr2_init if train.lr2_init > 0 else first
        last = train.lr2_final if train.lr2_final > 0 else last
    warmup = max(0, train.warmup_steps)
    if step < warmup:
        return first * (0.01 + 0.99 * step / warmup)
    passed = (step - warmup) / max(1, num_steps - warmup)
    span = max(train.lr_endpoint - train.lr_wait, 1e-9)
    return _decayed(first, last, min(1.0, max(0.0, (passed - train.lr_wait) / span)), train.lr_decay_type)


def _decayed(first: float, last: float, progress: float, kind: str) -> float:
    """cos is the released code's quarter cosine, which falls fastest at its end."""
    if kind == "exp":
        return first * (last / first) ** progress
    share = {
        "cos": math.cos(math.pi / 2 * progress),
        "linear": 1 - progress,
        "oneminussqrt": 1 - math.sqrt(progress),
    }[kind]
    return last + (first - last) * share
