"""Time the recurrences on states in slots, and on packed rows, against the same kernels on whole tensors, in turns.

    python benchmarks/slot_kernels.py [--shape 28 128] [--repeats 5] [--json benchmarks/results/serving.json]

prefill: prompts of one length, packed, from slots and to slots of a table with gaps, against [B, T]; and prompts of
many lengths, for which there is no rectangle, against one call for each. decode: one token of B rows of 28 layers, by
slots against states side by side. train: forward and backward of rows of four texts against rows of one. On a GPU each
is a CUDA graph, so that the host's time does not count. A row has median milliseconds, and `ratio`, how fast the first
is as a share of the second: 0.95 or more is wanted. --json adds the rows to those of a file.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from radlads.bench.cases import KernelCase
from radlads.bench.kernels import random_inputs
from radlads.bench.measure import device_name, timed
from radlads.model import recurrence
from radlads.model.packed_rows import texts_that_start_at
from radlads.model.sequences import Slots, sequences_of
from radlads.model.state_slots import Kind, run_in_slots, step_in_slots
from radlads.model.step_triton import step

WANTED_RATIO = 0.95
RECURRENCES = {"rwkv7": recurrence.rwkv7, "gla": recurrence.gla}
PREFILLS = [(1, 4096), (8, 512), (32, 128)]
MIXED_LENGTHS = (1, 2, 5, 17, 33, 64, 100, 129, 250, 400, 700, 2395)
ROWS = (1, 8, 32, 128)
LAYERS = 28
TRAINED = (8, 512)
CASES = ("prefill", "decode", "train")
GAP = 4096  # numbers between two slots, as where other tensors of a state lie


class Case(NamedTuple):
    """name; what is measured, and against what."""

    name: str
    ours: Callable[[], Any]
    other: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=[28, 128], help="heads and head size of a layer")
    parser.add_argument("--kernels", nargs="+", choices=list(RECURRENCES), default=list(RECURRENCES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=int, default=20, help="of each in a repeat")
    parser.add_argument("--tokens-divided-by", type=int, default=1, help="for a trial on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = [row for kind in arguments.kernels for row in measured(kind, arguments, device)]
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps(before + rows, indent=1) + "\n")


def measured(kind: Kind, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each case, printed as it comes."""
    H, N = arguments.shape
    share = arguments.tokens_divided_by
    of = {"prefill": prefills, "decode": decodes, "train": trainings}
    for case in itertools.chain.from_iterable(of[name](kind, H, N, share, device) for name in arguments.cases):
        ours, other = graphed(case.ours, device), graphed(case.other, device)
        times: dict[str, list[float]] = {"ms": [], "against_ms": []}
        for _ in range(arguments.repeats):
            for name, run in (("ms", ours), ("against_ms", other)):
                times[name].append(timed(run, device, warmup=2, runs=arguments.runs).median_ms)
        ms, against = (statistics.median(each) for each in times.values())
        row: dict[str, Any] = {"case": f"{kind} {case.name}", "device": device_name(device), "heads_and_size": [H, N]}
        for name, values in times.items():
            row[name] = round(statistics.median(values), 4)
            row[f"{name}_range"] = [round(min(values), 4), round(max(values), 4)]
        row |= {"ratio": round(against / ms, 3), "wanted": WANTED_RATIO}
        print(row, flush=True)
        yield row


def prefills(kind: Kind, H: int, N: int, share: int, device: torch.device) -> Iterator[Case]:
    for rows, length in PREFILLS:
        length = max(1, length // share)
        tensors = inputs(kind, (rows, length, H, N), device)
        states = torch.zeros(rows, H, N, N, device=device)
        packed = in_slots(kind, [x.flatten(0, 1) for x in tensors], [length] * rows)
        yield Case(f"prefill {rows} x {length}", packed, lambda t=tensors, s=states: RECURRENCES[kind](*t, s))
    lengths = [max(1, length // share) for length in MIXED_LENGTHS]
    tensors = [x[0] for x in inputs(kind, (1, sum(lengths), H, N), device)]
    pieces = list(zip(*(x[None].split(lengths, dim=1) for x in tensors), strict=True))
    state = torch.zeros(1, H, N, N, device=device)
    yield Case(
        f"prefill {len(lengths)} prompts of {min(lengths)} to {max(lengths)} against one by one",
        in_slots(kind, tensors, lengths),
        lambda: [RECURRENCES[kind](*piece, state) for piece in pieces],
    )


def in_slots(kind: Kind, tensors: list[torch.Tensor], lengths: list[int]) -> Callable[[], torch.Tensor]:
    """A prefill of prompts whose states are in slots, in another order than the prompts."""
    table, at = table_of(tensors[0], 2 * len(lengths)), torch.randperm(2 * len(lengths))[: len(lengths)]
    at = at.int().to(tensors[0].device)
    sequences = sequences_of(lengths, tensors[0].device)
    return lambda: run_in_slots(kind, tensors, sequences, Slots(table, at, at))


def decodes(kind: Kind, H: int, N: int, share: int, device: torch.device) -> Iterator[Case]:
    layers = LAYERS if share == 1 else 2
    for rows in ROWS:
        tensors = [x[:, 0].contiguous() for x in inputs(kind, (rows, 1, H, N), device)]
        # As many layers as a model has: fewer would find their states in the cache
        tables = [table_of(tensors[0], rows + 1) for _ in range(layers)]
        beside = [torch.zeros(rows, H, N, N, device=device) for _ in range(layers)]
        at = torch.randperm(rows).int().to(device)

        def ours(tensors=tensors, tables=tables, at=at):
            return [step_in_slots(kind, tensors, Slots(table, at, at)) for table in tables]

        def other(tensors=tensors, beside=beside, at=at):
            if device.type == "cuda":
                return [step(kind, tensors, states, None) for states in beside]
            return [step_in_slots(kind, tensors, Slots(states, at, at)) for states in beside]

        yield Case(f"decode {rows} rows, {layers} layers", ours, other)


def trainings(kind: Kind, H: int, N: int, share: int, device: torch.device) -> Iterator[Case]:
    rows, length = TRAINED[0], TRAINED[1] // share
    tensors = [x.requires_grad_() for x in inputs(kind, (rows, length, H, N), device)]
    d_out = torch.randn_like(tensors[3])
    starts = torch.zeros(rows, length, dtype=torch.bool, device=device)
    starts[:, [length // 5, length // 2, length - length // 4]] = True
    texts = texts_that_start_at(starts)

    def run(**more):
        return torch.autograd.grad(RECURRENCES[kind](*tensors, **more)[0], tensors, d_out)

    yield Case(f"train {rows} x {length}, four texts a row", lambda: run(texts=texts), run)


def inputs(kind: Kind, shape: tuple[int, int, int, int], device: torch.device) -> list[torch.Tensor]:
    return [x.detach() for x in random_inputs(KernelCase("", kind, shape), device, torch.bfloat16)]


def table_of(like: torch.Tensor, slots: int) -> torch.Tensor:
    """States [slots, H, N, N] of zeros with gaps between slots. like: [..., H, N]."""
    H, N = like.shape[-2:]
    memory = torch.zeros(slots, H * N * N + GAP, device=like.device)
    return memory[:, : H * N * N].unflatten(1, (H, N, N))


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same as a CUDA graph; on a CPU as it is."""
    if device.type == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


if __name__ == "__main__":
    main()
