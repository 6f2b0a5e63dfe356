"""Every tolerance of the numerics tests, as relative_error, with its reason. Observed values: docs/numerics.md."""

from typing import NamedTuple

import torch

# fp32 paths that sum in another order: rounding (1.2e-7) grows with the square root of a few hundred terms
RECURRENCE = 1e-5
# The gradient of log w is a difference of terms up to 100 times its size: a token's own write cancels out of it
DECAY_GRADIENT = 1e-4
# The fp32 oracle against float64: rounding of one multiply-add per token over 200 tokens
ORACLE = 1e-6
# A whole fp32 mixer against its equations in float64: RECURRENCE behind three more matrix products
MIXER = 5e-6
# A whole fp32 mixer or stack run in other pieces: RECURRENCE through up to three layers
SPLIT = 2e-5
# A padded batch against single rows: as SPLIT, with matrix products of other shapes
PADDING = 1e-5
# Logits against transformers' own Qwen2, absolute: the same operations in another order (the logits are of order 1)
PARITY = 1e-5
# bf16 has 8 bits (4e-3); a mixer chains about ten roundings, the decay and the state stay in fp32
BFLOAT16 = 5e-2
# 8-bit products of 4 significant bits, 1/16 of a number at worst and 1/40 in the mean, through three layers
FP8 = 0.15
# Checkpointing recomputes the same operations in the same order; allowed is one rounding of a sum of gradients
RECOMPUTE = 1e-6
# Two runs of 50 training steps in fp32 whose sums are in another order: rounding that Adam makes larger where a
# gradient is near zero (its update has the size of the rate whatever the gradient's); relative, of a step's loss
TRAJECTORY_MAX = 2e-5
TRAJECTORY_MEAN = 5e-6
# The same on a GPU, (largest, mean): kernels that multiply in TF32, and weights, gradients and moments in bf16
TRAJECTORY_GPU = {torch.float32: (5e-3, 1e-3), torch.bfloat16: (5e-2, 2e-2)}
# Logits of files that an older version wrote against those that it computed: the same operations, on another CPU
SAME_MODEL = 1e-6
# The end of a run that goes on from older files, three to six steps of up to 3e-3 later: weights, absolute, and logits.
# Without AVX it was 3.4e-5 away (Muon multiplies in bf16), without the optimiser's moments 6e-3
SAME_END = 1e-4


# On a GPU an error is held against what rounding alone does to the fp32 oracle: its inputs, outputs and their gradients
# rounded to what the backend multiplies in (bf16; TF32's 11 bits). The last rounding itself may fall otherwise
GPU_LAST_ROUNDING = {"tf32": 2.0**-11, "bf16": 2.0**-8}


class GpuBound(NamedTuple):
    """factor: how many times the error of rounding alone is allowed. exact: the bound where nothing is rounded."""

    factor: float
    exact: float

    def allowed(self, rounding: float, precision: str) -> float:
        """precision: "exact", "tf32" or "bf16"."""
        return self.exact if precision == "exact" else self.factor * rounding + GPU_LAST_ROUNDING[precision]


GPU_BOUNDS = {
    # Between its inputs and outputs a kernel rounds again: decayed keys, their products, the state before a product
    "KERNEL": GpuBound(factor=4.0, exact=RECURRENCE),
    # Gradients of kappa and a: made of what the removals find and of its gradient, both rounded solutions of a system
    "KERNEL_REMOVAL": GpuBound(factor=6.0, exact=RECURRENCE),
    # The gradient of log w and its sum over tokens, relative to the terms whose difference it is
    "KERNEL_DECAY": GpuBound(factor=4.0, exact=DECAY_GRADIENT),
    # Errors of one sign add up over tokens, as in fla's kernel for RAD-RWKV6 in TF32
    "KERNEL_DECAY_SUM": GpuBound(factor=8.0, exact=DECAY_GRADIENT),
    # A mixer's own products round as much as the recurrence between them
    "MIXER": GpuBound(factor=4.0, exact=SPLIT),
    "MIXER_GRADIENT": GpuBound(factor=5.0, exact=DECAY_GRADIENT),
    # Two or three layers, in which errors add up, and sums over 18944 channels in another order
    "MODEL": GpuBound(factor=3.0, exact=SPLIT),
    "MODEL_GRADIENT": GpuBound(factor=5.0, exact=DECAY_GRADIENT),
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude, or over `floor` where that is larger."""
    scale = max(expected.abs().max().item(), floor)
    return (actual.double() - expected.double()).abs().max().item() / scale
