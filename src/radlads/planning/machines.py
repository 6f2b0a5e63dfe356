"""The machine made of several GPUs of one kind. No torch."""

from dataclasses import dataclass

from radlads.train.logging.gpus import GPUS, Gpu


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
