"""Students whose recurrent layers have a softmax window: what setup makes of them, training, compiling, refusals."""

import pytest
import tiny
import torch
from tolerances import SPLIT, relative_error

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.distill.stage import is_trainable
from radlads.model import rad_rwkv6, rad_rwkv7
from radlads.model.block import Block
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes.single_stage import check_student

WINDOW = {"model.mixer.window_tokens": 8, "model.mixer.sink_tokens": 2}
MIXERS = {
    "rad_rwkv7 balanced": {"model.tmix": "rad_rwkv7", "model.gate_rank_type": 2, "model.groupnorm_att": 0},
    "rad_rwkv7 normed": {"model.tmix": "rad_rwkv7", "model.gate_rank_type": 2, "model.balance_state": 0},
    "rad_rwkv6": {"model.tmix": "rad_rwkv6", "model.gate_rank_type": 2, "model.use_pos_emb": 0},
}
mixers = pytest.mark.parametrize("mixer", MIXERS)


def student_of(teacher, mixer, **keys):
    torch.manual_seed(0)
    return build_student(open_teacher(teacher), load_config([], MIXERS[mixer] | keys).model)[0]


def tokens(length=40):
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(0))


@mixers
@pytest.mark.parametrize("window", [(40, 0), (300, 4), (36, 4)], ids=str)
def test_setup_with_a_silent_gate_is_the_teacher_while_the_window_covers_the_text(teacher, mixer, window):
    keys = {"model.mixer.window_tokens": window[0], "model.mixer.sink_tokens": window[1]}
    student = student_of(teacher, mixer, **keys)
    for block in student.model.layers:
        block.self_attn.g2.data.zero_()
    expected = build_teacher(open_teacher(teacher))(tokens()).logits
    torch.testing.assert_close(student(tokens()).logits, expected, atol=1e-5, rtol=0)


@mixers
def test_no_window_is_the_mixer_of_before_with_the_same_tensors_and_outputs(teacher, mixer):
    plain = student_of(teacher, mixer)
    off = student_of(teacher, mixer, **dict.fromkeys(WINDOW, 0))
    on = student_of(teacher, mixer, **WINDOW)
    assert off.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(off(tokens()).logits, plain(tokens()).logits)
    fresh = {"window_scale", "recurrent_scale"}
    added = on.state_dict().keys() - plain.state_dict().keys()
    assert {name.rpartition(".")[2] for name in added} == fresh and len(added) == 2 * 3
    assert all((on.state_dict()[name] == 1).all() for name in added)
    assert all(torch.equal(x, on.state_dict()[name]) for name, x in plain.state_dict().items())


@mixers
def test_a_student_with_a_window_is_stored_and_loaded(teacher, tmp_path, mixer):
    student = student_of(teacher, mixer, **WINDOW)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_model(student, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(tokens()).logits, student(tokens()).logits)


def test_the_scales_are_trained_as_the_mixers_parameters(teacher):
    student = student_of(teacher, "rad_rwkv7 balanced", **WINDOW)
    scales = [name for name in student.state_dict() if name.endswith("_scale")]
    assert len(scales) == 6
    assert all(is_trainable(name, student, "mixer") for name in scales)


def moved(mixer, **changes):
    torch.manual_seed(0)
    settings = {mixer: {"window_tokens": 8, "sink_tokens": 2}}
    model = RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=[mixer] * 3, mixer_settings=settings, **changes))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


ROPES = {
    "plain": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_a_window_is_softmax_attention_with_every_rope_and_normed_heads(mixer, rope, use_rope):
    """Without the recurrence a layer is the softmax layer of the same weights."""
    parameters = {"rope_type": "default", "rope_theta": 1e4} | ROPES[rope]
    changes = {"rope_parameters": parameters, "qk_norm": True, "use_rope": use_rope}
    model = moved(mixer, **changes)
    model.config.mixer_settings[mixer]["window_tokens"] = 40
    windowed = RadladsForCausalLM(model.config)
    softmax = RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=["qwen2"] * 3, **changes))
    for each in (windowed, softmax):
        each.load_state_dict(model.state_dict(), strict=False)
    if mixer == "rad_rwkv6":  # or its token shift would change queries, keys and values
        for block in windowed.model.layers:
            for name, parameter in block.self_attn.named_parameters():
                parameter.zero_() if name.startswith("time_maa") else None
    for block in windowed.model.layers:
        block.self_attn.window_scale.fill_(1.0)
        block.self_attn.recurrent_scale.zero_()
    assert relative_error(windowed(tokens(40)).logits, softmax(tokens(40)).logits) < SPLIT


def pointwise(r, log_w, k, v, *rest):
    """In place of a recurrence: the CPU's is no part of a graph, as the GPU's operators are."""
    out = (r * k * log_w.exp()).sum(-1, keepdim=True) * v
    return out, out.new_zeros(*out.shape[::2], out.shape[-1], out.shape[-1])


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_a_windowed_layer_is_one_graph_at_every_length(mixer, monkeypatch):
    """Block.mixed, as training compiles it, with its gradients."""
    monkeypatch.setattr(rad_rwkv6, "gla", pointwise)
    monkeypatch.setattr(rad_rwkv7, "rwkv7", pointwise)
    model = moved(mixer)
    block, compiled = model.model.layers[1], torch.compile(Block.mixed, backend="aot_eager", fullgraph=True)
    for length in (100, 150, 5):
        hidden, v_first = torch.randn(2, length, 64, requires_grad=True), torch.randn(2, length, 4, 16)
        shared = model.model.shared_inputs(hidden, None, None, None)
        found = []
        for mixed in (Block.mixed, compiled):
            out, _ = mixed(block, hidden, v_first, shared)
            found.append((out, *torch.autograd.grad(out.square().sum(), [hidden, block.self_attn.window_scale])))
        for expected, ours in zip(*found, strict=True):
            assert relative_error(ours, expected) < SPLIT


def test_recomputed_layers_have_the_same_gradients():
    model, found = moved("rad_rwkv7").train(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_later_stage_with_another_window_is_refused(tmp_path):
    student = moved("rad_rwkv7").config
    for given in ({}, WINDOW):
        check_student(tiny.stage_config(tmp_path, "distill", **given), student, None)
    for key, value in (("window_tokens", 0), ("sink_tokens", 0), ("window_tokens", 9)):
        config = tiny.stage_config(tmp_path, "distill", **{f"model.mixer.{key}": value})
        with pytest.raises(ValueError, match=rf"^model.mixer.{key} "):
            check_student(config, student, None)


def test_a_window_beyond_the_context_is_refused():
    settings = {"rad_rwkv7": {"window_tokens": 60, "sink_tokens": 5}}
    config = RadladsConfig(**tiny.SIZES | {"max_position_embeddings": 64}, mixer_settings=settings)
    with pytest.raises(ValueError, match="are more than the 64 tokens of the model's context: give fewer"):
        RadladsForCausalLM(config)
