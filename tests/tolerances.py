"""Every tolerance of the numerics tests, as relative_error, with its reason. Observed values: docs/numerics.md."""

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
# Checkpointing recomputes the same operations in the same order; allowed is one rounding of a sum of gradients
RECOMPUTE = 1e-6


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude, or over `floor` where that is larger."""
    scale = max(expected.abs().max().item(), floor)
    return (actual.double() - expected.double()).abs().max().item() / scale
