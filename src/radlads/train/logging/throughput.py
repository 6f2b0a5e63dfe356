"""How fast a stage trains, and in how much memory: what each row of metrics says of the time since the row before.

Wall time, so held-out measurements and checkpoints in between are in it. These figures differ from run to run, so they
are kept apart from metrics.csv, in speed.csv.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from radlads.distill.arithmetic import train_flops
from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import is_registered
from radlads.model.whole_parameters import whole_shape
from radlads.train.logging.gpus import gpu_called

SPEED_METRICS = frozenset({"tokens_per_s", "mfu", "peak_memory_gb"})


class Throughput:
    """Counts from when it is made, or from `begin`.

    flops_per_token: None where unknown. num_devices: over how many the tokens that `since_last_row` is told are spread,
    all like `device`.
    """

    def __init__(
        self,
        flops_per_token: float | None,
        device: torch.device,
        *,
        num_devices: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._flops, self._device, self._clock = flops_per_token, device, clock
        peak = peak_flop_per_s(device)
        self._peak = None if peak is None else peak * num_devices
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Count tokens from now, where so many are done."""
        self._since, self._tokens = self._clock(), tokens

    def since_last_row(self, tokens: int) -> dict[str, float]:
        """Speed and memory since the last call, now that `tokens` are done; the device must have done them.

        tokens_per_s: of all devices together. mfu: the stage's arithmetic per second over the devices' bf16 peak, left
        out where either is unknown. peak_memory_gb: most that tensors took at once on this GPU since this began, in
        1e9 bytes (a CUDA graph's own show only when it is recorded); left out on a CPU.
        """
        speed = (tokens - self._tokens) / max(self._clock() - self._since, 1e-9)
        row = {"tokens_per_s": speed}
        if self._flops is not None and self._peak is not None:
            row["mfu"] = speed * self._flops / self._peak
        if self._device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self.begin(tokens)
        return row


def peak_flop_per_s(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s as the GPU's maker says; None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_called(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.tflop_per_s * 1e12


def stage_flops(
    stage: Stage, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, sequence_tokens: int
) -> float | None:
    """FLOPs per token of the stage's step, as train_flops counts them; None where a mixer is none of ours.

    Counted from whole sequences, documents or not. Where the student trains in part, the weight gradients of linear
    layers that do not train are not counted. Call it once it is settled which parameters train.
    """
    models = [student] if teacher is None else [student, teacher]
    if not all(is_registered(model.config) for model in models):
        return None
    if stage.name == "align":
        assert teacher is not None
        return train_flops("align", student.config, teacher.config, sequence_tokens)
    # Extending may have a teacher, and then does what distilling does
    learns = teacher is not None and stage.needs_teacher
    frozen = [each.weight for each in student.modules() if isinstance(each, nn.Linear)]
    num_frozen = sum(whole_shape(weight).numel() for weight in frozen if not weight.requires_grad)
    configs = (student.config, teacher.config if teacher is not None and learns else student.config)
    return train_flops("distill" if learns else "extend", *configs, sequence_tokens) - 2.0 * num_frozen
