"""Time the chunked recurrences against their step-by-step oracles, forward and backward.

    python benchmarks/recurrence.py [--batch 8 --tokens 512 --heads 4 --head-size 64 --threads 2]

Prints the median of several runs of each, and the ratio.
"""

import argparse
import statistics
import time

import torch

from radlads.model.recurrence import gla_chunked, rwkv7_chunked
from radlads.model.recurrence_reference import gla_reference, rwkv7_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.batch, arguments.tokens, arguments.heads, arguments.head_size)
    inputs = random_inputs(shape)
    print(f"[B, T, H, N] = {list(shape)}, fp32, {arguments.threads} threads, forward + backward, median")
    for name, oracle, chunked, tensors in (
        ("rad_rwkv7", rwkv7_reference, rwkv7_chunked, inputs),
        ("rad_rwkv6", gla_reference, gla_chunked, inputs[:4]),
    ):
        slow, fast = seconds(oracle, tensors, runs=3), seconds(chunked, tensors, runs=15)
        print(
            f"{name}: oracle {slow * 1000:7.1f} ms   chunked {fast * 1000:6.1f} ms   ratio {slow / fast:5.1f}",
            flush=True,
        )


def random_inputs(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """r, log w, k, v, kappa, a in their ranges, requiring gradients."""
    torch.manual_seed(0)
    r, k, v, kappa = (torch.randn(shape) for _ in range(4))
    log_w = -0.6065 * torch.sigmoid(torch.randn(shape))
    tensors = [r, log_w, k, v, torch.nn.functional.normalize(kappa, dim=-1), torch.sigmoid(torch.randn(shape))]
    return [tensor.requires_grad_() for tensor in tensors]


def seconds(recurrence, tensors, *, runs: int) -> float:
    """Median time of forward and backward, after one run to warm up."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        out, _ = recurrence(*tensors)
        torch.autograd.grad(out.sum(), tensors)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
