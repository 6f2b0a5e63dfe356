"""Packed rows, states in slots and steps in slots on a GPU, against the fp32 oracles run text by text.

Shape letters: B rows, T tokens, S sequences, H heads, N head size.
"""

import functools

import pytest
import torch
from gpu_comparison import (
    DEVICE,
    DISPATCH,
    DRY_RUN,
    INPUTS,
    Comparison,
    assert_within_bounds,
    precision_of,
    require,
    rounded,
)
from packed_cases import each_alone, integers, numbers_of, padded_states, text_by_text, tokens
from tolerances import relative_error

from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.packed_rows import texts_that_start_at
from radlads.model.recurrence_reference import gla_reference, rwkv7_reference
from radlads.model.sequences import Slots, sequences_of
from radlads.model.state_slots import run_in_slots, step_in_slots

pytestmark = pytest.mark.gpu

ORACLES = {"rwkv7": rwkv7_reference, "gla": gla_reference}
BOUNDS = {"d kappa": "KERNEL_REMOVAL", "d a": "KERNEL_REMOVAL", "d log_w": "KERNEL_DECAY"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 2
# Texts of two rows, and sequences: of 1 to 4096 tokens, about chunks of 32
TEXTS = ((1, 31, 33, 5), (69, 1)) if DRY_RUN else ((1, 31, 33, 700, 5, 64, 3262), (4096,))
LENGTHS = (1, 32, 5, 70, 33) if DRY_RUN else (1, 32, 2047, 4096, 5, 33, 31, 1, 700)

kinds = pytest.mark.parametrize("kind", ORACLES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
head_sizes = pytest.mark.parametrize("N", [64, 128])


@pytest.fixture(autouse=True)
def triton_is_here():
    require("triton")


def as_kernels_see(tensors, precision):
    """Inputs rounded as what a kernel multiplies in; the decay, the second, is not."""
    return [x if place == 1 else rounded(x, precision) for place, x in enumerate(tensors)]


def compared(kind, dtype, where, found, exact, by_rounding):
    """Comparisons by name; rounding is the worst that it does to any. Scales are at least 1: gradients may be 0."""
    precision = precision_of("triton", DTYPES[dtype])
    scale = max(1.0, *(x.abs().max().item() for name, x in exact.items() if name in ("d k", "out")))
    errors = {name: [relative_error(x[name], exact[name], scale) for x in (found, by_rounding)] for name in exact}
    worst = max(rounding for _, rounding in errors.values())
    return [
        Comparison(BOUNDS.get(name, "KERNEL"), f"{kind} packed, {dtype}", f"{name}, {where}", precision, error, worst)
        for name, (error, _) in errors.items()
    ]


def texts_on_device():
    starts = torch.zeros(len(TEXTS), sum(TEXTS[0]), dtype=torch.bool)
    for row, lengths in zip(starts, TEXTS, strict=True):
        row[torch.tensor(lengths).cumsum(0)[:-1]] = True
    return texts_that_start_at(starts.to(DEVICE))


def results(kind, run, tensors, d_out, d_last):
    """Outputs, last states and all gradients, in fp32."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, last = run(*leaves)
    torch.autograd.backward([out, last], [d_out.to(out.dtype), d_last])
    named = zip(INPUTS[kind], leaves, strict=False)
    return {"out": out.detach().float(), "last": last.detach()} | {f"d {name}": x.grad.float() for name, x in named}


@kinds
@dtypes
@head_sizes
def test_texts_of_a_row_are_as_if_each_were_alone(kind, dtype, N):
    B, T = len(TEXTS), sum(TEXTS[0])
    tensors = tokens(kind, B, T, HEADS, N, device=DEVICE)
    d_out = torch.randn(B, T, HEADS, N, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    d_last = torch.randn(B, HEADS, N, N, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    no_state = torch.zeros_like(d_last)
    alone = text_by_text(ORACLES[kind], TEXTS)
    oracle = lambda *leaves: alone(*leaves, no_state)  # noqa: E731
    precision = precision_of("triton", DTYPES[dtype])
    exact = results(kind, oracle, tensors, d_out, d_last)
    by_rounding = results(kind, oracle, as_kernels_see(tensors, precision), rounded(d_out, precision), d_last)
    by_rounding = {name: x if name == "last" else rounded(x, precision) for name, x in by_rounding.items()}
    packed = functools.partial(DISPATCH[kind], backend="triton", texts=texts_on_device())
    given = [x if place == 1 else x.to(DTYPES[dtype]) for place, x in enumerate(tensors)]
    found = results(kind, packed, given, d_out, d_last)
    assert_within_bounds(compared(kind, dtype, f"texts, N {N}", found, exact, by_rounding))


@kinds
@dtypes
@head_sizes
def test_sequences_begin_and_end_in_slots_far_apart(kind, dtype, N):
    S = len(LENGTHS)
    first = [-1 if number % 3 == 2 else number for number in range(S)]
    last = [-1 if number % 4 == 3 else number for number in range(S)]
    tensors, precision = tokens(kind, sum(LENGTHS), HEADS, N, device=DEVICE), precision_of("triton", DTYPES[dtype])
    states, memory = padded_states(S + 2, HEADS, N, DEVICE)
    before = memory.clone()
    exact, by_rounding = (
        dict(zip(("out", "states"), each_alone(kind, x, states, LENGTHS, first, last), strict=True))
        for x in (tensors, as_kernels_see(tensors, precision))
    )
    by_rounding["out"] = rounded(by_rounding["out"], precision)
    given = [x if place == 1 else x.to(DTYPES[dtype]) for place, x in enumerate(tensors)]
    slots = Slots(states, integers(first, DEVICE), integers(last, DEVICE))
    out = run_in_slots(kind, given, sequences_of(LENGTHS, DEVICE), slots, "triton")
    found = {"out": out.float(), "states": states}
    assert_within_bounds(compared(kind, dtype, f"slots, N {N}", found, exact, by_rounding))
    untouched = [slot for slot in range(S + 2) if slot not in last]
    assert torch.equal(memory[untouched], before[untouched])
    assert torch.equal(memory[:, HEADS * N * N :], before[:, HEADS * N * N :])


@kinds
@dtypes
def test_a_sequence_among_others_is_bit_equal_to_one_alone(kind, dtype):
    N, number = 128, 3
    begin, length = sum(LENGTHS[:number]), LENGTHS[number]
    given = tokens(kind, sum(LENGTHS), HEADS, N, device=DEVICE, dtype=DTYPES[dtype])
    states, _ = padded_states(len(LENGTHS), HEADS, N, DEVICE)
    own, at = states[number : number + 1].clone(), integers(range(len(LENGTHS)), DEVICE)
    out = run_in_slots(kind, given, sequences_of(LENGTHS, DEVICE), Slots(states, at, at), "triton")
    alone = [x[begin : begin + length] for x in given]
    out_alone = run_in_slots(kind, alone, sequences_of([length], DEVICE), Slots(own, at[:1], at[:1]), "triton")
    assert torch.equal(out[begin : begin + length], out_alone)
    assert torch.equal(states[number], own[0])


@kinds
@dtypes
@head_sizes
def test_a_recorded_step_follows_slots_and_skips_padded_rows(kind, dtype, N):
    """Replayed with other rows and slots than it was recorded with."""
    B, precision = 5, precision_of("triton", DTYPES[dtype])
    states, memory = padded_states(B + 3, HEADS, N, DEVICE)
    static = tokens(kind, B, HEADS, N, device=DEVICE, dtype=DTYPES[dtype])
    at = integers([-1] * B, DEVICE)
    step = functools.partial(step_in_slots, kind, static, Slots(states, at, at), "triton")
    untouched = memory.clone()
    replay, out = recorded(step)
    assert torch.equal(memory, untouched), "padded rows have no state to change"
    for seed, places in enumerate([(4, 0, 7, 2, 1), (3, 2, -1, 6, -1)], start=1):
        tensors = tokens(kind, B, HEADS, N, device=DEVICE, seed=seed)
        for mine, new in zip(static, tensors, strict=True):
            mine.copy_(new)
        at.copy_(integers(places, DEVICE))
        exact, by_rounding = (
            dict(zip(("out", "states"), each_alone(kind, x, states, [1] * B, places, places), strict=True))
            for x in (tensors, as_kernels_see(tensors, precision))
        )
        real = [row for row, place in enumerate(places) if place >= 0]
        out = replay()
        assert not out[[row for row in range(B) if row not in real]].any()
        exact["out"], by_rounding["out"] = exact["out"][real], rounded(by_rounding["out"][real], precision)
        found = {"out": out[real].float(), "states": states}
        assert_within_bounds(compared(kind, dtype, f"step, N {N}", found, exact, by_rounding))
        assert torch.equal(memory[:, HEADS * N * N :], untouched[:, HEADS * N * N :])


def recorded(step):
    """A function that replays a step's CUDA graph, and its output; in a dry run, one that runs the step."""
    if DRY_RUN:
        return step, step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return lambda: graph.replay() or out, out


ROWS = ((3, 20, 1, 17), (41,)) if DRY_RUN else ((3, 200, 1, 308), (512,))
STACKS = {
    "rwkv7": {"time_mixers": ["rad_rwkv7"] * 2},
    "rwkv6 and softmax": {"time_mixers": ["rad_rwkv6", "qwen2"], "use_tokenshift": True},
}


def gradients(model, batches):
    """Of the sum of all logits' log partition functions."""
    model.zero_grad(set_to_none=True)
    for ids, numbers in batches:
        model(ids, seq_idx=numbers, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@dtypes
def test_training_on_packed_rows_is_training_on_cut_ones(stack, compiled, dtype):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    with DEVICE:
        model = RadladsForCausalLM(RadladsConfig(**sizes, **heads, **STACKS[stack])).train()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    ids = torch.randint(0, 97, (len(ROWS), sum(ROWS[0])), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    numbers = numbers_of(ROWS).to(DEVICE)
    texts = [(text[None], None) for row, lengths in zip(ids, ROWS, strict=True) for text in row.split(lengths)]
    exact = gradients(model, texts)
    model.to(DTYPES[dtype])
    cut = gradients(model, texts)
    if compiled:
        model.compile_blocks(backend="eager" if DRY_RUN else "inductor")
    packed = gradients(model, [(ids, numbers)])
    precision = "bf16" if dtype == "bf16" else "exact"
    scale = max(x.abs().max().item() for x in exact.values()) * 1e-2
    worst = max(relative_error(cut[name], exact[name], scale) for name in exact)
    assert packed.keys() == exact.keys()
    assert_within_bounds(
        [
            Comparison(
                "MODEL_GRADIENT",
                f"packed training, {dtype}",
                f"{stack}, {name}",
                precision,
                relative_error(packed[name], exact[name], scale),
                worst if precision == "bf16" else 0.0,
            )
            for name in exact
        ]
    )
