"""Time, memory and the machine's own ceilings. Times are medians after a warm-up that is not counted."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Timing:
    """Median, fastest and slowest of several runs, in milliseconds; warmup_s came before, compilation included."""

    median_ms: float
    min_ms: float
    max_ms: float
    runs: int
    warmup_s: float

    @classmethod
    def of(cls, times_ms: list[float], warmup_s: float) -> "Timing":
        """The summary of single runs."""
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms), warmup_s)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured: copies (bytes read plus written), matrix-vector and matrix products."""

    copy_gb_per_s: float
    matvec_gb_per_s: float
    matmul_tflop_per_s: float


def device_name(device: torch.device) -> str:
    """The device, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def timed(run: Callable[[], object], device: torch.device, *, warmup: int, runs: int) -> Timing:
    """Time `runs` calls one by one, after `warmup` calls. On CUDA by events, so nothing waits between the calls."""
    began = time.perf_counter()
    for _ in range(warmup):
        run()
    synchronize(device)
    warmup_s = time.perf_counter() - began
    times_ms = _times_by_events(run, runs) if device.type == "cuda" else _times_by_clock(run, runs)
    return Timing.of(times_ms, warmup_s)


def _times_by_events(run: Callable[[], object], runs: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _times_by_clock(run: Callable[[], object], runs: int) -> list[float]:
    times_ms = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times_ms.append(1000 * (time.perf_counter() - began))
    return times_ms


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_bytes(device: torch.device) -> int | None:
    """Bytes of tensors now on a CUDA device; None elsewhere. Begins a new count of the peak."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors at once on a CUDA device since held_bytes(); None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy 2 GiB, multiply 8192^3, and read a 1 GiB matrix for one vector; all far smaller on a CPU."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    num_values, side, rows = (2**30, 8192, 65536) if cuda else (2**22, 256, 4096)
    values_bytes = num_values * dtype.itemsize
    copy_ms = _copy_ms(num_values, device, dtype)
    matmul_ms = _matmul_ms(side, device, dtype)
    matvec_ms = _matvec_ms(rows, side, device, dtype)
    release_memory(device)
    return Ceilings(
        copy_gb_per_s=2 * values_bytes / copy_ms / 1e6,
        matvec_gb_per_s=rows * side * dtype.itemsize / matvec_ms / 1e6,
        matmul_tflop_per_s=2 * side**3 / matmul_ms / 1e9,
    )


def _copy_ms(num_values: int, device: torch.device, dtype: torch.dtype) -> float:
    source = torch.zeros(num_values, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), device, warmup=3, runs=10).median_ms


def _matmul_ms(side: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return timed(lambda: torch.mm(left, right, out=out), device, warmup=5, runs=20).median_ms


def _matvec_ms(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> float:
    """The faster of torch's two ways to multiply a matrix with one vector."""
    matrix = torch.randn(rows, columns, device=device, dtype=dtype)
    vector = torch.randn(columns, device=device, dtype=dtype)
    ways = (lambda: torch.mv(matrix, vector), lambda: F.linear(vector[None], matrix))
    return min(timed(way, device, warmup=3, runs=20).median_ms for way in ways)
