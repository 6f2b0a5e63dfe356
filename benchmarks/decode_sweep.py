"""Time each kernel of a fused decoding step at several launch sizes, and the whole step, on the GPU.

    python benchmarks/decode_sweep.py [--rows 1 32] [--layers 8] [--window 64] [--only gate_up down]

Shapes are Qwen2.5-7B's. Prints microseconds and GB/s of weights (or states) read and written; `cublas` beside several
rows' kernels is torch.mm. Times are medians of replays of a CUDA graph that goes through all layers once, so that
weights come from memory and not from the L2 (low ranks and one row's states fit into it: read their GB/s with that in
mind). The best sizes belong into ONE_ROW and SEVERAL_ROWS of radlads/inference/fused_launches.py.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from radlads.inference.fused_launches import ONE_ROW, SEVERAL_ROWS, Launch
from radlads.inference.fused_step import FusedStep
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

LAYERS_7B = 28
SINKS, FAR = 4, 4096
PRODUCTS = ("inputs", "output", "gate_up", "down", "head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--window", type=int, default=0, help="window_tokens of all layers, with 4 sinks")
    parser.add_argument("--only", nargs="+", default=[*PRODUCTS, "low_ranks", "recurrence", "norm", "step"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this sweep times GPU kernels, and PyTorch sees no GPU here")
    began = time.perf_counter()
    model = random_model(arguments.layers, arguments.window)
    with torch.inference_mode():
        for rows in arguments.rows:
            for line in sweep(model, rows, arguments.only):
                print(f"{time.perf_counter() - began:5.0f} s  rows {rows:3}  {line}", flush=True)


def random_model(num_layers: int, window_tokens: int = 0) -> RadladsForCausalLM:
    """Qwen2.5-7B's shapes with fewer layers, group-normed, bf16, every parameter small and random."""
    sizes = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    window = {"rad_rwkv7": {"window_tokens": window_tokens, "sink_tokens": SINKS}} if window_tokens else {}
    config = RadladsConfig(**sizes, **heads, balance_state=False, groupnorm_att=True, mixer_settings=window)
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model


def sweep(model: RadladsForCausalLM, rows: int, only: list[str]) -> Iterator[str]:
    """A line for every kernel and launch size."""
    step = FusedStep(model, rows)
    for name in PRODUCTS:
        if name in only:
            yield from sweep_product(step, name)
    layers = step.layers
    if "low_ranks" in only:
        num_bytes = sum(step.low.shape[2] * sum(layer.ranks) * 2 for layer in layers)
        for columns in (32, 64, 128):
            step.launches = dataclasses.replace(step.launches, low_rank_columns=columns)
            run = each(layers, lambda layer: step.second_low_ranks(layer, step.projected))
            yield line(f"low ranks  columns {columns}", run, num_bytes, len(layers))
    if "recurrence" in only:
        yield from sweep_recurrence(model, rows)
    if "norm" in only and rows > 1:
        norms = [layer.block.input_layernorm for layer in layers]
        run = each(norms, lambda norm: step.add_and_norm(step.launches.down.splits, norm))
        yield line("add and norm", run, len(layers) * step.launches.down.splits * rows * 3584 * 4, len(layers))
    if "step" in only:
        yield from sweep_step(model, rows)


def sweep_recurrence(model: RadladsForCausalLM, rows: int) -> Iterator[str]:
    """States at several sizes with the configured window, then windows with the configured states."""
    step = full_step(model, rows)
    configured, numbers = step.launches, range(1, len(step.layers))
    cos = sin = torch.ones(rows, model.config.head_dim // 2, device="cuda")
    num_bytes = 2 * step.states[1:].nbytes

    def time_of(text: str, **sizes: int) -> str:
        step.launches = dataclasses.replace(configured, **sizes)
        run = each(numbers, lambda number: step.recurrence(step.layers[number], number, step.projected, cos, sin))
        return line(f"recurrence {text}", run, num_bytes, len(numbers))

    for values, warps in ((128, 8), (128, 16), (64, 8), (32, 4), (32, 8), (16, 4)):
        yield time_of(f"values {values} warps {warps}", state_values=values, state_warps=warps)
    if step.windows[0] is not None:
        for slots, stages in itertools.product((8, 16, 32, 64, 128), (1, 3)):
            yield time_of(f"slots {slots} stages {stages}", window_slots=slots, slot_stages=stages)


def full_step(model: RadladsForCausalLM, rows: int) -> FusedStep:
    """A step far into its text, so that windows are full."""
    step = FusedStep(model, rows)
    step.held.counters.fill_(FAR)
    return step


def sweep_step(model: RadladsForCausalLM, rows: int) -> Iterator[str]:
    """The whole step as it is configured, and what that makes of 28 layers."""
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    for programmatic in (False, True):
        step = full_step(model, rows)
        step.starts_early = programmatic
        whole = median_us(lambda step=step: step(tokens))
        step.layers = step.layers[:1]
        per_layer = (whole - median_us(lambda step=step: step(tokens))) / (len(model.model.layers) - 1)
        all_us = whole + (LAYERS_7B - len(model.model.layers)) * per_layer
        yield (
            f"step, programmatic launch {programmatic!s:5}: {per_layer:7.1f} us per layer; "
            f"{LAYERS_7B} layers {all_us / 1000:.3f} ms = {rows * 1e6 / all_us:,.0f} tokens/s"
        )


def sweep_product(step: FusedStep, name: str) -> Iterator[str]:
    weights, product = product_of(step, name)
    num_bytes = sum(weight.nbytes for weight in weights)
    for launch in one_row_launches(name) if step.rows == 1 else several_rows_launches(name):
        step.partial = step.partial.new_zeros(launch.splits, *step.partial.shape[1:])
        if step.partial.shape[0] > 1 and name not in ("output", "down"):
            continue
        run = each(list(range(len(weights))), lambda number, launch=launch: product(number, launch))
        text = f"{name:8} n {launch.block_n:3} k {launch.block_k:4} warps {launch.warps}"
        if step.rows > 1:
            text += f" splits {launch.splits} stages {launch.stages}"
        yield line(text, run, num_bytes, len(weights))
    if step.rows > 1:
        x = torch.randn(step.rows, weights[0].shape[1], device="cuda").bfloat16()
        yield line(f"{name:8} cublas", each(weights, lambda weight: torch.mm(x, weight.T)), num_bytes, len(weights))


def product_of(step: FusedStep, name: str) -> tuple[list[torch.Tensor], Callable[[int, Launch], None]]:
    """A product's weights in each layer, and a function that runs layer `number`'s."""
    layers = step.layers[1:]  # the first has other input rows
    weights = {
        "inputs": [layer.inputs for layer in layers],
        "output": [layer.mixer.o_proj.weight for layer in layers],
        "gate_up": [layer.gate_up for layer in layers],
        "down": [layer.block.mlp.down_proj.weight for layer in layers],
        "head": [step.model.lm_head.weight],
    }[name]
    x = {"output": step.heads_out, "down": step.inner}.get(name, step.hidden if step.rows == 1 else step.normed)
    one = step.rows == 1
    residual = step.hidden if one else None
    out = {"inputs": step.projected, "gate_up": step.inner, "head": step.logits}.get(name, residual)
    norm = step.model.model.norm

    def run(number: int, launch: Launch) -> None:
        bias = layers[number].bias if name == "inputs" else None
        if one:
            adds, normed = name in ("output", "down"), name in ("inputs", "gate_up", "head")
            step.project_one_row(
                launch,
                x,
                weights[number],
                out,
                bias=bias,
                norm=norm if normed else None,
                add=adds,
                gated=name == "gate_up",
            )
        else:
            target = step.partial if out is None else out
            step.project_rows(launch, x, weights[number], target, bias=bias, gated=name == "gate_up")

    return weights, run


def one_row_launches(name: str) -> list[Launch]:
    sizes = [(4, 512, 4), (8, 512, 4), (8, 512, 8), (16, 256, 4), (4, 1024, 4), (2, 1024, 4)]
    return [getattr(ONE_ROW, name), *(x for x in (Launch(*size) for size in sizes) if x != getattr(ONE_ROW, name))]


def several_rows_launches(name: str) -> list[Launch]:
    chosen = getattr(SEVERAL_ROWS, name)
    sizes = [(32, 128, 4), (64, 128, 4), (64, 64, 4), (128, 64, 4), (32, 256, 4)]
    splits = (2, 4) if name in ("output", "down") else (1,)
    others = [Launch(*size, splits=split, stages=4) for size in sizes for split in splits]
    return [chosen, *(x for x in others if x != chosen)]


def each(items, run) -> Callable[[], None]:
    def all_of_them() -> None:
        for item in items:
            run(item)

    return all_of_them


def line(text: str, run: Callable[[], None], num_bytes: int, calls: int) -> str:
    us = median_us(run)
    return f"{text:50} {us / calls:8.1f} us {num_bytes / us / 1000:7.0f} GB/s"


def median_us(run: Callable[[], None], replays: int = 15) -> float:
    """Median microseconds of a graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


if __name__ == "__main__":
    main()
