"""Optimisers by name, their two parameter groups (mixer, rest), and the learning rate as a function of the step."""

import math

import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import is_mixer_parameter
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.adamw import AdamW

_MISSING = {
    "dsfusedadamw": ("DeepSpeed's fused Adam", "adamw, which is fused too"),
    "adamwschedulefree": ("schedule-free AdamW", "adamw"),
    "adam8bit": ("8-bit Adam", "adamw"),
    "lion": ("Lion", "adamw"),
}


def build_optimizers(student: RadladsForCausalLM, train: TrainConfig) -> list[torch.optim.Optimizer]:
    """Optimisers over the parameters that require gradients; every group has a "role", "mixer" or "rest".

    adamw: AdamW for all, weight decay on matrices only. muon: Muon for the blocks' matrices (its updates scaled to
    AdamW's size, so that rates mean the same), AdamW for embedding, head and vectors.
    Raises ValueError if nothing trains or the optimiser named is not available.
    """
    if train.optimizer not in ("adamw", "muon"):
        what, instead = _MISSING[train.optimizer]
        raise ValueError(f"train.optimizer {train.optimizer!r} ({what}) is not available yet: use {instead}")
    by_muon: dict[str, list[torch.nn.Parameter]] = {}
    by_adam: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "mixer" if is_mixer_parameter(name, student) else "rest"
        if train.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name:
            by_muon.setdefault(role, []).append(parameter)
        else:
            by_adam.setdefault((role, parameter.ndim == 2), []).append(parameter)
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
            {"params": parameters, "role": role, "weight_decay": train.weight_decay if decays else 0.0}
            for (role, decays), parameters in by_adam.items()
        ]
        betas = (train.beta1, train.beta2)
        optimizers.append(AdamW(adam, train.lr_init, betas, train.adam_eps, fused=True))
    return optimizers


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
