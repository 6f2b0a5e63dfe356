"""GPUs by name, with their makers' figures, and the machine made of several. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory_gib: what the maker calls GB. tflop_per_s: dense bf16 products, gb_per_s: memory; both as the maker says.
    has_fp8: whether the 8-bit teacher runs on it."""

    memory_gib: int
    tflop_per_s: float
    gb_per_s: float
    has_fp8: bool = False

    @property
    def usable_bytes(self) -> float:
        """What tensors may take: the rest is the driver's, communication's and what lies between tensors."""
        return USABLE_SHARE * self.memory_gib * 2**30


USABLE_SHARE = 0.9
GPUS = {
    "a100-40": Gpu(40, 312, 1555),
    "a100": Gpu(80, 312, 2039),
    "l40s": Gpu(48, 362, 864),
    "rtx4090": Gpu(24, 165, 1008),
    "h100-pcie": Gpu(80, 756, 2000, has_fp8=True),
    "h100": Gpu(80, 989, 3350, has_fp8=True),
    "h200": Gpu(141, 989, 4800, has_fp8=True),
    "b200": Gpu(180, 2250, 7700, has_fp8=True),
    "mi300x": Gpu(192, 1307, 5300),
    "mi325x": Gpu(256, 1307, 6000),
}


@dataclass(frozen=True)
class Machine:
    """Several GPUs of one kind. Raises ValueError for an unknown kind or none of them."""

    kind: str
    num_gpus: int

    def __post_init__(self) -> None:
        if self.kind not in GPUS:
            raise ValueError(f"no GPU {self.kind!r}: choose one of {', '.join(GPUS)}")
        if self.num_gpus < 1:
            raise ValueError(f"--gpus must be 1 or more, not {self.num_gpus}")

    @property
    def gpu(self) -> Gpu:
        """One of them."""
        return GPUS[self.kind]

    def __str__(self) -> str:
        return f"{self.num_gpus} x {self.kind} ({self.gpu.memory_gib} GB)"
