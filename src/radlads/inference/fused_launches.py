"""Launch sizes of a fused step's kernels (fused_step.py); benchmarks/decode_sweep.py times others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """block_n weight rows and block_k columns at a time, in `warps` warps. Of several rows' kernel only: `splits`
    programs share a sum over K, with loads running `stages` blocks ahead."""

    block_n: int
    block_k: int
    warps: int
    splits: int = 1
    stages: int = 1


@dataclass(frozen=True)
class Launches:
    """Launch sizes of a step's products; low_rank_columns: output columns per program of the second low ranks.
    state_values: rows of a head's state that a program holds at a time. window_slots: keys and values of its window at
    a time, with slot_stages - 1 tiles of them loading ahead where one does not hold all.
    """

    inputs: Launch
    output: Launch
    gate_up: Launch
    down: Launch
    head: Launch
    low_rank_columns: int = 64
    state_values: int = 128
    state_warps: int = 8
    window_slots: int = 128
    slot_stages: int = 1


# For 132 multiprocessors: some 20 KB of loads in flight on each hide the memory's latency. One row: a program has two
# blocks of 8 KB in flight, and several programs share a multiprocessor.
ONE_ROW = Launches(
    inputs=Launch(block_n=8, block_k=512, warps=4),
    output=Launch(block_n=4, block_k=512, warps=4),
    gate_up=Launch(block_n=16, block_k=256, warps=4),
    down=Launch(block_n=4, block_k=512, warps=4),
    head=Launch(block_n=8, block_k=512, warps=4),
)
# Several rows: 64 weight rows share one read of the inputs; splits make some 200 programs of the narrow products
SEVERAL_ROWS = Launches(
    inputs=Launch(block_n=32, block_k=128, warps=4, stages=4),
    output=Launch(block_n=64, block_k=128, warps=4, splits=4, stages=4),
    gate_up=Launch(block_n=64, block_k=128, warps=4, stages=4),
    down=Launch(block_n=64, block_k=128, warps=4, splits=4, stages=4),
    head=Launch(block_n=64, block_k=128, warps=4, stages=4),
    state_values=16,
    state_warps=4,
    window_slots=8,  # takes 72 registers a thread, so that 32 rows of 28 heads are all on the GPU at once
    slot_stages=3,
)
