"""The decoder on the CPU: its steps against the model's own forward and the full one."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tolerances import SPLIT, relative_error

from radlads.inference.decode_steps import CachedStep, RecurrentStep, build_step, can_be_fused
from radlads.inference.decoder import Decoder
from radlads.inference.packed_weights import pack
from radlads.inference.prefill import left_padded, prefill
from radlads.inference.sampling import Sampling
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

VOCAB = 97
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


def perturbed(mixers=("rad_rwkv7",) * 2, **changes):
    """A model whose every parameter is moved, so that nothing in it is silent."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": len(mixers)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    ranks = {"lora_rank_decay": 20, "lora_rank_gate": 40}
    config = RadladsConfig(**{**sizes, **heads, **ranks, "time_mixers": list(mixers), **changes})
    model = RadladsForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_after(step, model, prompts, continuation):
    """The step's logits after each of the tokens [B] of the continuation, as one tensor."""
    tokens, mask = left_padded(prompts, model.device)
    with torch.inference_mode():
        step.load(prefill(model, tokens, mask=mask)[1])
        return torch.stack([step(token).clone() for token in continuation])


def full_logits(model, prompts, continuation):
    """The same by one forward for each row and token, without any cache."""
    rows = []
    for row, prompt in enumerate(prompts):
        read = [*prompt, *(int(tokens[row]) for tokens in continuation)]
        with torch.inference_mode():
            rows.append(model(torch.tensor([read]), use_cache=False).logits[0, len(prompt) :])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("file", ["interpreted_kernels.py", "interpreted_windows.py"])
def test_the_fused_kernels_in_tritons_interpreter(file):
    """In a process of their own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_packing_leaves_the_model_as_it_was_and_holds_large_weights_once():
    model = perturbed(gate_rank_type=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = pack(model)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for layer in layers:
        mixer = layer.mixer
        for weight in (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight, mixer.gate.weight):
            assert weight.untyped_storage().data_ptr() == layer.inputs.untyped_storage().data_ptr()
        assert layer.block.mlp.up_proj.weight.untyped_storage().data_ptr() == layer.gate_up.untyped_storage().data_ptr()
    assert [layer.inputs.data_ptr() for layer in pack(model)] == [layer.inputs.data_ptr() for layer in layers]


def test_packing_again_follows_trained_and_moved_parameters():
    model = perturbed()
    pack(model)
    mixer = model.model.layers[1].self_attn
    with torch.no_grad():
        mixer.w1.add_(1)
        mixer.k_proj.bias.add_(1)
    mixer.k_proj.weight.data = mixer.k_proj.weight.data + 1
    layer = pack(model)[1]
    expected = torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight, mixer.w1.T])
    assert torch.equal(layer.inputs[: len(expected)], expected)
    assert torch.equal(layer.bias[128:192], mixer.k_proj.bias)
    assert mixer.k_proj.weight.data_ptr() == layer.inputs[128:].data_ptr()


def test_a_packed_model_still_trains():
    model = perturbed()
    pack(model)
    model.train()(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


WINDOW = {"mixer_settings": {f"rad_rwkv{n}": {"window_tokens": 3, "sink_tokens": 1} for n in (6, 7)}}


@pytest.mark.parametrize("changes", [{}, WINDOW], ids=["plain", "windowed"])
@pytest.mark.parametrize("mixers", [["rad_rwkv7"] * 2, ["rad_rwkv6"] * 2, ["rad_rwkv6", "rad_rwkv7"]])
def test_a_recurrent_step_is_the_models_forward_and_keeps_its_states_in_place(mixers, changes):
    model = perturbed(mixers, **changes)
    step = build_step(model, 3)
    assert isinstance(step, RecurrentStep) and step.is_graphable
    continuation = torch.randint(VOCAB, (6, 3))
    expected = full_logits(model, PROMPTS, continuation)
    assert relative_error(logits_after(step, model, PROMPTS, continuation), expected) < SPLIT
    places = [x.data_ptr() for layer in step.cache.layers for x in layer.state if x is not None]
    assert relative_error(logits_after(step, model, PROMPTS, continuation), expected) < SPLIT
    assert [x.data_ptr() for layer in step.cache.layers for x in layer.state if x is not None] == places


def test_a_stack_with_softmax_layers_steps_through_its_cache():
    model = perturbed(["rad_rwkv7", "qwen2"])
    step = build_step(model, 3)
    assert isinstance(step, CachedStep)
    continuation = torch.randint(VOCAB, (3, 3))
    actual = logits_after(step, model, PROMPTS, continuation)
    assert relative_error(actual, full_logits(model, PROMPTS, continuation)) < SPLIT


def test_prefill_of_ragged_prompts_in_pieces_is_prefill_at_once():
    model = perturbed()
    tokens, mask = left_padded(PROMPTS, model.device)
    whole, _ = prefill(model, tokens, mask=mask)
    pieces, cache = prefill(model, tokens, mask=mask, piece=2)
    assert relative_error(pieces, whole) < SPLIT
    assert cache.next_positions.tolist() == [len(prompt) for prompt in PROMPTS]


def test_what_can_be_fused():
    assert can_be_fused(perturbed(), 64)
    assert not can_be_fused(perturbed(), 65)
    assert not can_be_fused(perturbed(["rad_rwkv6"]), 1)
    assert not can_be_fused(perturbed(head_dim=32), 1)
    assert can_be_fused(perturbed(**WINDOW), 1)
    assert not can_be_fused(perturbed(["rad_rwkv6"], **WINDOW), 1)
    mixed = perturbed()
    mixed.lm_head.to(torch.bfloat16)
    assert not can_be_fused(mixed, 1)


def test_a_decoder_serves_one_batch_after_another():
    model = perturbed()
    decoder = Decoder(model, 2, Sampling(seed=3))
    texts = []
    for _ in range(2):
        decoder.prefill(PROMPTS[:2])
        texts.append(list(decoder.generated(8)))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_a_decoder_wants_a_prompt_for_each_row():
    with pytest.raises(ValueError, match="give one for each row"):
        Decoder(perturbed(), 2, GREEDY).prefill(PROMPTS)


def test_reading_the_same_prompt_twice_reads_it_twice_and_nothing_is_kept():
    model, tokens = perturbed(), torch.tensor([PROMPTS[0]])
    num_read = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: num_read.append(args[0].shape[1]))
    first, again = (weakref.ref(prefill(model, tokens)[1]) for _ in range(2))
    assert num_read == [len(PROMPTS[0])] * 2
    gc.collect()
    assert first() is None and again() is None
