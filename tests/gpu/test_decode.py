"""Decoding on a GPU: fused kernels, CUDA graphs and ragged batches give the model's own logits; memory stays put."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from gpu_comparison import DEVICE, DRY_RUN
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolerances import BFLOAT16, relative_error
from transformers import GenerationConfig

from radlads.bench.measure import release_memory
from radlads.evaluation.costs import cost_of_context
from radlads.inference.batching.answers import Job
from radlads.inference.batching.engine import Engine
from radlads.inference.batching.slots import RecurrentSlots
from radlads.inference.decode_steps import RecurrentStep, build_step
from radlads.inference.decoder import Decoder
from radlads.inference.finite import NotFinite
from radlads.inference.generate import decode_ms, generate_tokens
from radlads.inference.prefill import left_padded, prefill
from radlads.inference.sampling import Sampling
from radlads.model import recurrence
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DRY_RUN, reason="graphs and fused kernels need a GPU")]

GREEDY = Sampling(temperature=0, max_tokens=40)
VARIANTS = {
    "balanced": {"balance_state": True, "groupnorm_att": False},
    "group-normed": {"balance_state": False, "groupnorm_att": True},
    "both": {"balance_state": True, "groupnorm_att": True},
    "neither": {"balance_state": False, "groupnorm_att": False},
    "full-gate": {"gate_rank_type": 1, "use_rope": False},
    "no-gate": {"gate_rank_type": 0, "head_dim": 64},
}
# Prompts have some 70 tokens: windows that are full and those that fill; more slots than are read at a time
WINDOWS = {"64+4": (64, 4), "16": (16, 0), "300+2": (300, 2)}
# fp32 paths that sum up to 4736 terms in other orders, through two layers
FP32 = 5e-5
BOUNDS = {torch.float32: FP32, torch.bfloat16: BFLOAT16}
STEPS, WINDOW_STEPS = 5, 40
MISSING = recurrence.missing


@pytest.fixture(autouse=True)
def exact_prefill(monkeypatch):
    """Torch's own recurrences, fp32 in every dtype: what is compared here is decoding."""
    monkeypatch.setattr(recurrence, "missing", lambda backend, v: None if backend in ("reference", "chunked") else "no")


def build(dtype=torch.float32, *, mixer="rad_rwkv7", **changes):
    """Two layers of 7B's width (smaller FFN and vocabulary), every parameter moved."""
    sizes = {"vocab_size": 4099, "hidden_size": 3584, "intermediate_size": 4736, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
    torch.manual_seed(0)
    with DEVICE:
        model = RadladsForCausalLM(RadladsConfig(**{**sizes, **heads, "time_mixers": [mixer] * 2, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return model.to(dtype)


def window_keys(window_tokens, sink_tokens):
    return {"mixer_settings": {"rad_rwkv7": {"window_tokens": window_tokens, "sink_tokens": sink_tokens}}}


def prompts_of(rows):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4099, (70 - row,), generator=generator).tolist() for row in range(rows)]


def continued(model, rows, steps=STEPS, **how):
    """The greedy tokens [steps + 1, rows] of a Decoder, and the logits they were chosen from after the first."""
    decoder = Decoder(model, rows, GREEDY, **how)
    decoder.prefill(prompts_of(rows))
    tokens, logits = [decoder.tokens.clone()], []
    for _ in range(steps):
        decoder.step()
        tokens.append(decoder.tokens.clone())
        logits.append(decoder.logits.float().clone())
    return torch.stack(tokens), torch.stack(logits)


@torch.inference_mode()
def full_logits(model, rows, tokens):
    """What one forward without a cache says about the same tokens."""
    found = []
    for row, prompt in enumerate(prompts_of(rows)):
        read = torch.tensor([[*prompt, *tokens[:-1, row].tolist()]], device=DEVICE)
        found.append(model(read, use_cache=False).logits[0, len(prompt) :].float())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_decoding_is_the_full_forward(variant, dtype, rows):
    pytest.importorskip("triton")
    model = build(dtype, **VARIANTS[variant])
    tokens, logits = continued(model, rows)
    # In bf16 the expected logits are the fp32 model's on the same, rounded, weights: both paths round, differently
    expected = full_logits(model.float(), rows, tokens)
    assert relative_error(logits, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("variant", ["balanced", "group-normed", "full-gate", "no-gate"])
@pytest.mark.parametrize("window", WINDOWS)
def test_fused_decoding_with_a_window_is_the_full_forward(window, variant, dtype, rows):
    pytest.importorskip("triton")
    from radlads.inference.fused_step import FusedStep

    model = build(dtype, **VARIANTS[variant], **window_keys(*WINDOWS[window]))
    assert isinstance(build_step(model, rows), FusedStep)
    tokens, logits = continued(model, rows, WINDOW_STEPS)
    expected = full_logits(model.float(), rows, tokens)
    assert relative_error(logits, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generic_decoding_is_the_full_forward(mixer, rows):
    model = build(mixer=mixer)
    tokens, logits = continued(model, rows, fused=False)
    assert relative_error(logits, full_logits(model, rows, tokens)) < FP32


@pytest.mark.parametrize("changes", [{}, window_keys(16, 4)], ids=["plain", "windowed"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_replayed_graph_is_the_eager_step(rows, fused, changes):
    model = build(torch.bfloat16, **changes)
    replayed, eager = (continued(model, rows, fused=fused, graphed=graphed) for graphed in (True, False))
    assert torch.equal(replayed[0], eager[0])
    torch.testing.assert_close(replayed[1], eager[1], rtol=0, atol=0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=0, top_p=0.9, max_tokens=40), Sampling(seed=0, top_k=50)])
def test_a_second_batch_in_the_same_decoder_is_the_first_again(sampling):
    decoder = Decoder(build(torch.bfloat16), 3, sampling)
    texts = []
    for _ in range(2):
        decoder.prefill(prompts_of(3))
        texts.append(list(decoder.generated(40)))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40


def test_a_ragged_batch_is_its_rows_one_by_one():
    """In fp32, where no two likeliest tokens are within rounding of each other."""
    model = build()
    together = generate_tokens(model, prompts_of(3), GREEDY)
    assert together == [generate_tokens(model, [prompt], GREEDY)[0] for prompt in prompts_of(3)]


def test_a_stop_token_ends_its_row_only():
    model = build()
    whole = generate_tokens(model, prompts_of(2), GREEDY)
    stops = frozenset({whole[0][5]})
    expected = [row[: row.index(whole[0][5])] if whole[0][5] in row else row for row in whole]
    assert generate_tokens(model, prompts_of(2), GREEDY, stops) == expected


@pytest.mark.parametrize("how", [{}, {"fused": False}, {"fused": False, "graphed": False}])
def test_what_is_not_finite_is_told_by_its_position(how):
    model, prompts = build(torch.bfloat16), prompts_of(2)
    decoder = Decoder(model, 2, GREEDY, **how)
    decoder.prefill(prompts)
    tokens = [row[0] for row in decoder.generated(20)]
    known = {*prompts[0], *prompts[1], *tokens[:3]}
    place = next(place for place in range(3, 20) if tokens[place] not in {*known, *tokens[:place]})
    model.model.embed_tokens.weight.data[tokens[place]] = torch.nan
    decoder.prefill(prompts)
    with pytest.raises(NotFinite, match=rf"within the first {len(prompts[0]) + place + 1} tokens"):
        list(decoder.generated(30))


def test_replays_draw_anew_and_in_proportion():
    """A model that always says the same: 200 tokens in 32 rows follow its distribution."""
    model = build(torch.bfloat16, vocab_size=64)
    model.lm_head.weight.data.zero_()
    decoder = Decoder(model, 32, Sampling(seed=0, max_tokens=200))
    decoder.prefill([[1, 2, 3]] * 32)
    drawn = torch.tensor([list(step) for step in decoder.generated(200)])
    counts = drawn.flatten().bincount(minlength=64)
    expected = drawn.numel() / 64
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 110  # 63 degrees of freedom: beyond this once in 4000 runs
    assert len({tuple(row) for row in drawn.T.tolist()}) == 32
    assert len(set(drawn[:, 0].tolist())) > 40


@pytest.mark.parametrize("changes", [{}, window_keys(16, 4)], ids=["plain", "windowed"])
def test_fused_and_generic_states_stay_together(changes):
    """After 300 steps of given tokens the logits still agree."""
    pytest.importorskip("triton")
    from radlads.inference.fused_step import FusedStep

    model = build(**changes)
    fused, generic = FusedStep(model, 2), RecurrentStep(model)
    tokens, mask = left_padded(prompts_of(2), DEVICE)
    with torch.inference_mode():
        cache = prefill(model, tokens, mask=mask)[1]
        fused.load(cache)
        generic.load(cache)
        for token in torch.randint(4099, (300, 2), device=DEVICE):
            actual, expected = fused(token), generic(token)
    assert relative_error(actual, expected) < FP32


@pytest.mark.slow
def test_memory_beside_the_weights_does_not_grow_with_the_position():
    peaks = {}
    model = build(torch.bfloat16)
    for position in (100, 8000):
        decoder = Decoder(model, 1, GREEDY)
        decoder.prefill([[1] * position], piece=100)
        torch.cuda.synchronize()
        release_memory(DEVICE)  # of earlier decoders, which refer to themselves
        torch.cuda.reset_peak_memory_stats()
        for _ in range(20):
            decoder.step()
        torch.cuda.synchronize()
        peaks[position] = torch.cuda.max_memory_allocated()
        del decoder
    assert abs(peaks[8000] - peaks[100]) < 1 << 20


def test_packing_takes_no_second_copy_of_the_weights():
    model = build(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    decoder = Decoder(model, 1, GREEDY)
    small = sum(parameter.nbytes for name, parameter in model.named_parameters() if name.endswith("1"))
    states = 2 * 28 * 128 * 128 * 4
    assert torch.cuda.memory_allocated() - before < small + states + (8 << 20)
    del decoder


def test_a_steps_time_is_measured():
    assert 0.01 < decode_ms(build(torch.bfloat16), torch.ones(2, 5, dtype=torch.int64, device=DEVICE), steps=5) < 50


@pytest.mark.parametrize("mixer", ["rad_rwkv7", "qwen2"])
def test_the_peak_of_a_context_holds_its_state_and_not_the_weights(mixer, monkeypatch):
    monkeypatch.setattr(recurrence, "missing", MISSING)  # torch's own, in fp32, take as much memory as these weights
    model = build(torch.bfloat16, mixer=mixer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    short, long = (cost_of_context(model, torch.arange(length).remainder(4099).tolist()) for length in (64, 1024))
    for cost in (short, long):
        assert cost.state_bytes == state_bytes(model.config, cost.context_tokens, bytes_per_value=2)
        assert cost.state_bytes <= cost.peak_bytes < weights
    assert (long.state_bytes > short.state_bytes) == (mixer == "qwen2")


@pytest.mark.parametrize("changes", [{}, window_keys(16, 4)], ids=["plain", "windowed"])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_a_server_join_and_leave_under_graphs(fused, changes):
    """Five texts in graphs of 1, 2, 4 and 5 rows; every one is what it is alone, to the end."""
    if fused:
        pytest.importorskip("triton")
    model, texts = build(**changes), [torch.randint(4099, (50,), device=DEVICE) for _ in range(5)]
    with torch.inference_mode():
        slots = RecurrentSlots(model, 5, fused=fused)
        rows, fed, found = [], [20] * 5, {}
        for number, text in enumerate(texts):
            slots.put(number, prefill(model, text[None, :20])[1])
            rows.append(number)
            for _ in range(4):
                advance(slots, rows, texts, fed, found)
        while rows:
            slots.move(len(rows) - 1, 0)
            rows = [rows[-1], *rows[1:-1]] if len(rows) > 1 else []
            for _ in range(2 if rows else 0):
                advance(slots, rows, texts, fed, found)
    for number, text in enumerate(texts):
        with torch.inference_mode():
            expected = model(text[None, : fed[number]], use_cache=False).logits[0, -1]
        assert relative_error(found[number], expected) < FP32


def advance(slots, rows, texts, fed, found):
    """A step of all rows, each given its own text's next token."""
    logits = slots.step(torch.stack([texts[number][fed[number]] for number in rows]))
    for row, number in enumerate(rows):
        fed[number] += 1
        found[number] = logits[row].clone()


@pytest.mark.parametrize("stack", [["rad_rwkv7"] * 2, ["rad_rwkv7", "qwen2"]], ids=["recurrent", "softmax"])
def test_an_engine_answers_many_at_a_time_what_generate_does(stack):
    model = build(time_mixers=stack)
    model.generation_config = GenerationConfig()
    prompts = [torch.randint(4099, (length,)).tolist() for length in (3, 70, 9, 9, 31, 200)]
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(4099)}, unk_token="w0"))
    engine = Engine(model, SimpleNamespace(_tokenizer=words), max_concurrent=4, piece_tokens=64)

    async def text_of(generation):
        return "".join([text async for text in generation.texts()])

    async def go():
        jobs = [Job(prompt, GenerationConfig(max_new_tokens=20 + 3 * n)) for n, prompt in enumerate(prompts)]
        return await asyncio.gather(*(text_of(engine.submit(job)) for job in jobs))

    found = asyncio.run(go())
    engine.close()
    for number, prompt in enumerate(prompts):
        (tokens,) = generate_tokens(model, [prompt], Sampling(temperature=0, max_tokens=20 + 3 * number))
        assert found[number] == words.decode(tokens)
