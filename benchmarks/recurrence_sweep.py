"""Time each of our recurrence kernels at several launch sizes, on the GPU.

    python benchmarks/recurrence_sweep.py [--kernels rwkv7 gla] [--shape 32 512 28 128] [--only gradient]

One part of a Launch (src/radlads/model/chunked_passes.py) changes at a time. A line has the median microseconds of
each kernel, forward with what is kept and backward, by the profiler, and how far the gradients are from those of the
launch in use, as ||difference|| / ||gradient||: a launch that computes something else is not a faster one. The best
sizes belong into BFLOAT16 of rwkv7_triton.py and gla_triton.py.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from radlads.bench.cases import KernelCase
from radlads.bench.kernels import random_inputs
from radlads.model.chunked_passes import Launch
from radlads.model.gla_triton import GlaChunks, gla
from radlads.model.rwkv7_triton import Rwkv7Chunks, rwkv7

KERNELS = {"rwkv7": Rwkv7Chunks, "gla": GlaChunks}
FUNCTIONS = {"rwkv7": rwkv7, "gla": gla}
# What `_gradients` is tried with: key channels, value channels at a time, warps, registers
GRADIENTS = {
    "rwkv7": [
        (64, 16, 8, 128),
        (64, 32, 8, 128),
        (64, 64, 8, 128),
        (64, 128, 8, 128),
        (64, 32, 8, None),
        (64, 16, 4, None),
        (64, 64, 4, None),
        (128, 64, 8, None),
        (128, 16, 16, 128),
    ],
    "gla": [
        (64, 16, 8, None),
        (64, 32, 8, None),
        (64, 64, 8, None),
        (64, 32, 4, None),
        (64, 32, 4, 128),
        (128, 32, 8, 128),
    ],
}
PREPARE_WARPS = (2, 4, 8)
SCANS = [(64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2), (32, 4, 3), (128, 8, 2)]
WARMUP, RUNS = 2, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--shape", nargs=4, type=int, default=[32, 512, 28, 128], help="B T H N")
    parser.add_argument("--only", default="", help="launches whose line begins so: prepare, scan or gradient")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this sweep times GPU kernels, and PyTorch sees no GPU here")
    began = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, [B, T, H, N] = {arguments.shape}, bf16, microseconds", flush=True)
    for kernel in arguments.kernels:
        for line in sweep(kernel, tuple(arguments.shape), arguments.only):
            print(f"{time.perf_counter() - began:4.0f} s  {kernel:5}  {line}", flush=True)


def launches(kernel: str, usual: Launch) -> Iterator[tuple[str, Launch]]:
    """The launch in use and those that differ from it in one part, with names."""
    yield "in use", usual
    for warps in PREPARE_WARPS:
        yield f"prepare warps {warps}", usual._replace(prepare_warps=(warps, warps))
    for values, warps, stages in SCANS:
        name = f"scan values {values} warps {warps} stages {stages}"
        yield name, usual._replace(values=values, scan_warps=warps, scan_stages=stages)
    for keys, step, warps, registers in GRADIENTS[kernel]:
        name = f"gradient keys {keys} step {step} warps {warps} registers {registers}"
        changes = {"keys": keys, "gradient_step": step, "gradient_warps": warps, "gradient_registers": registers}
        yield name, usual._replace(**changes)


def sweep(kernel: str, shape: tuple[int, int, int, int], only: str) -> Iterator[str]:
    """A line for every launch."""
    chunks, run = KERNELS[kernel], FUNCTIONS[kernel]
    torch.manual_seed(0)
    inputs = random_inputs(KernelCase("", kernel, shape), torch.device("cuda"), torch.bfloat16)
    d_out = torch.randn_like(inputs[3])
    usual, expected = chunks.launches, None
    for name, launch in launches(kernel, usual.bfloat16):
        if name != "in use" and not name.startswith(only):
            continue
        chunks.launches = usual._replace(bfloat16=launch)
        try:
            times_us, gradients = measure(run, inputs, d_out)
        except Exception as error:
            yield f"{name:52} {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        finally:
            chunks.launches = usual
        expected = expected or gradients
        yield f"{name:52} {text(times_us)}   {difference(gradients, expected):.1e}"


def measure(run, inputs: list[torch.Tensor], d_out: torch.Tensor):
    """Microseconds of each kernel of one forward and backward pass, and the gradients."""
    for _ in range(WARMUP):
        gradients = torch.autograd.grad(run(*inputs)[0], inputs, d_out)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            gradients = torch.autograd.grad(run(*inputs)[0], inputs, d_out)
        torch.cuda.synchronize()
    durations: dict[str, list[float]] = defaultdict(list)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.name in ("_prepare", "_scan", "_gradients"):
            durations[event.name].append(event.time_range.elapsed_us())
    scans = durations.pop("_scan")
    times_us = {
        "prepare": durations["_prepare"],
        "scan": scans[::2],
        "scan back": scans[1::2],
        "gradients": durations["_gradients"],
    }
    return {name: statistics.median(each) for name, each in times_us.items()}, gradients


def text(times_us: dict[str, float]) -> str:
    """Times of the kernels and their sum."""
    return "  ".join(f"{name} {us:6.0f}" for name, us in (*times_us.items(), ("all", sum(times_us.values()))))


def difference(found, expected) -> float:
    """The largest of all gradients' differences; NaN counts as infinite."""
    ratios = [(x.float() - y.float()).norm() / y.float().norm() for x, y in zip(found, expected, strict=True)]
    return torch.nan_to_num(torch.stack(ratios), nan=float("inf")).max().item()


if __name__ == "__main__":
    main()
