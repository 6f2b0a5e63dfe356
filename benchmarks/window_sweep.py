"""Time the softmax window's kernels at several launch sizes, on the GPU.

    python benchmarks/window_sweep.py [--shape 4 512 28 4 128] [--window 64 4]

A line has the median microseconds of each kernel, forward and backward, by the profiler, and how far the output and the
gradients are from those of the launch in use, as ||difference|| / ||expected||. The best sizes belong into HALF of
src/radlads/model/window_triton.py.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

from radlads.model import window_triton
from radlads.model.window_triton import Launch, attend_by_kernels

KERNELS = ("attend", "gradients_of_queries", "gradients_of_keys")
OTHERS = "sum"  # what torch runs between them
WARMUP, RUNS = 2, 7
# Block, warps, stages. Not 64, 4, 3 nor 128 in 4 warps or 3 stages: they spill or find no room, and take half of the
# time that all together would compile
SIZES = [*product((32, 64), (4, 8), (1, 2)), (32, 4, 3), (32, 8, 3), (64, 8, 3), (128, 8, 1), (128, 8, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=5, type=int, default=[4, 512, 28, 4, 128], help="B T H K N")
    parser.add_argument("--window", nargs=2, type=int, default=[64, 4], help="window and sink tokens")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this sweep times GPU kernels, and PyTorch sees no GPU here")
    print(f"{torch.cuda.get_device_name()}, [B, T, H, K, N] = {arguments.shape}, bf16, microseconds", flush=True)
    B, T, H, K, N = arguments.shape
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, heads, N, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K)]
    d_out = torch.randn_like(inputs[0])
    usual, expected = window_triton.HALF, None
    for launch in launches(usual):
        window_triton.HALF = launch
        name = f"block {launch.block} warps {launch.query_warps}, {launch.key_warps} stages {launch.stages}"
        try:
            times_us, results = measure([x.requires_grad_() for x in inputs], d_out, *arguments.window)
        except Exception as error:
            print(f"{name:36} {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}", flush=True)
            continue
        expected = expected or results
        times = "  ".join(f"{kernel} {us:6.1f}" for kernel, us in times_us.items())
        print(f"{name:36} {times}  all {sum(times_us.values()):6.1f}   {difference(results, expected):.1e}", flush=True)


def launches(usual: Launch) -> Iterator[Launch]:
    """The launch in use, and others."""
    yield usual
    for block, warps, stages in SIZES:
        yield usual._replace(block=block, query_warps=warps, key_warps=warps, stages=stages)


def measure(inputs: list[torch.Tensor], d_out: torch.Tensor, window_tokens: int, sink_tokens: int):
    """Microseconds of each kernel of one forward and backward pass; the output and the gradients."""

    def run() -> list[torch.Tensor]:
        out = attend_by_kernels(*inputs, None, None, None, window_tokens=window_tokens, sink_tokens=sink_tokens)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]

    for _ in range(WARMUP):
        results = run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    durations: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            durations[event.name if event.name in KERNELS else OTHERS].append(event.time_range.elapsed_us())
    return {name: statistics.median(each) for name, each in durations.items()}, results


def difference(found, expected) -> float:
    """The largest of all results' differences; NaN counts as infinite."""
    ratios = [(x.float() - y.float()).norm() / y.float().norm() for x, y in zip(found, expected, strict=True)]
    return torch.nan_to_num(torch.stack(ratios), nan=float("inf")).max().item()


if __name__ == "__main__":
    main()
