"""GPUs by name, with their makers' figures. No torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory_gib: what the maker calls GB. tflop_per_s: dense bf16 products, gb_per_s: memory; both as the maker says.
    has_fp8: whether the 8-bit teacher runs on it. device_name: a pattern of all that torch calls it."""

    memory_gib: int
    tflop_per_s: float
    gb_per_s: float
    device_name: str
    has_fp8: bool = False

    @property
    def usable_bytes(self) -> float:
        """What tensors may take: the rest is the driver's, communication's and what lies between tensors."""
        return USABLE_SHARE * self.memory_gib * 2**30


USABLE_SHARE = 0.9
GPUS = {
    "a100-40": Gpu(40, 312, 1555, "NVIDIA A100-(SXM4|PCIE)-40GB"),
    "a100": Gpu(80, 312, 2039, "NVIDIA A100(-SXM4-80GB|-SXM-80GB| 80GB PCIe)"),
    "l40s": Gpu(48, 362, 864, "NVIDIA L40S"),
    "rtx4090": Gpu(24, 165, 1008, "NVIDIA GeForce RTX 4090"),
    "h100-pcie": Gpu(80, 756, 2000, "NVIDIA H100 PCIe", has_fp8=True),
    "h100": Gpu(80, 989, 3350, "NVIDIA H100 80GB HBM3", has_fp8=True),
    "h200": Gpu(141, 989, 4800, "NVIDIA H200", has_fp8=True),
    "b200": Gpu(180, 2250, 7700, "NVIDIA B200", has_fp8=True),
    "mi300x": Gpu(192, 1307, 5300, "AMD Instinct MI300X.*"),
    "mi325x": Gpu(256, 1307, 6000, "AMD Instinct MI325X.*"),
}


def gpu_called(device_name: str) -> Gpu | None:
    """The GPU that torch calls so; None for a part of one (MIG), and for any that is not in the table."""
    found = (gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_name, device_name))
    return next(found, None)
