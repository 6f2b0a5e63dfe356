"""A frozen teacher whose matrices are 8-bit floats: half the memory, and close to twice the arithmetic of bf16.

Owns the rounded copy of a teacher. Embedding, norms, biases and head stay what they are, and so does the teacher.
"""

import torch
from torch import nn

from radlads.model.modeling import RadladsForCausalLM

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# Rows of no values at all are scaled by something
SMALLEST_SCALE = 1e-12
OLDEST_CAPABILITY = (9, 0)


class Fp8Linear(nn.Module):
    """x W^T + b with 8-bit x and W (E4M3: 4 significant bits), summed in fp32; inference only.

    Every token of x and every row of W has its own scale, so that its largest value is the largest 8-bit number. On a
    GPU a product of 8-bit numbers; elsewhere one of the rounded numbers in fp32, which is there to be compared with.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype):
        super().__init__()
        weight, scale = _rounded(linear.weight.detach().to(device))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().to(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out] in x's dtype."""
        rows, scale = _rounded(x.flatten(0, -2))
        if x.is_cuda:
            y = torch._scaled_mm(rows, self.weight.T, scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = (rows.float() @ self.weight.float().T) * scale * self.scale
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit numbers [M, K] and scales [M, 1] (fp32), whose product is `rows`."""
    rows = rows.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def fp8_copy(teacher: RadladsForCausalLM, device: torch.device, dtype: torch.dtype) -> RadladsForCausalLM:
    """A copy of the teacher on `device`, the matrices of its blocks in 8 bits, all else in `dtype`.

    Raises ValueError for a GPU without 8-bit products, or sizes that they do not take.
    """
    check_device(device)
    with torch.device("meta"):
        copy = RadladsForCausalLM(teacher.config)
    for name, linear in teacher.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            if device.type == "cuda" and (linear.in_features % 16 or linear.out_features % 16):
                raise ValueError(
                    f"layers.{name} of the teacher is {linear.in_features} by {linear.out_features}; 8-bit products "
                    "take multiples of 16: set train.teacher_precision same"
                )
            copy.model.layers.set_submodule(name, Fp8Linear(linear, device, dtype))
    rest = copy.state_dict()
    kept = {name: value.to(device, dtype) for name, value in teacher.state_dict().items() if name in rest}
    copy.load_state_dict({name: value for name, value in kept.items() if rest[name].is_meta}, strict=False, assign=True)
    copy.tie_weights()
    assert not any(value.is_meta for value in copy.state_dict().values())
    return copy.requires_grad_(False).eval()


def check_device(device: torch.device) -> None:
    """Raise ValueError for a device without 8-bit products; a CPU multiplies what the numbers stand for."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(
            f"train.teacher_precision fp8 needs a GPU with 8-bit products, which {device.type} has not: set same"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise ValueError(
            f"this GPU (compute capability {'.'.join(map(str, capability))}) has no 8-bit products, which "
            "train.teacher_precision fp8 needs: set it to same, or take a GPU of compute capability 9.0 or newer"
        )
