"""Teachers beyond plain Qwen2 against transformers' own classes: Qwen3, Llama 3, scaled RoPE; and their students."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tolerances import PARITY, SPLIT, relative_error
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model, save_model
from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher, teacher_config
from radlads.convert.student import build_student, build_teacher, retie, student_config
from radlads.convert.weight_map import table
from radlads.distill.align import Align
from radlads.inference.decode_steps import RecurrentStep, can_be_fused
from radlads.inference.prefill import left_padded, prefill
from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.rope import rope_attention_factor, rope_inverse_frequencies
from radlads.recipes.reload_check import reload_max_abs_diff

LENGTH = 150  # beyond the scaled families' original contexts
MIXERS = ("rad_rwkv6", "rad_rwkv7")
families = pytest.mark.parametrize("family", tiny.FAMILIES)
mixers = pytest.mark.parametrize("mixer", MIXERS)
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def model_keys(mixer, **keys):
    return load_config([], {f"model.{key}": value for key, value in ({"tmix": mixer} | keys).items()}).model


def moved(model):
    """The model with every parameter moved, so that no low-rank factor is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, family):
    return tiny.family_folder(tmp_path / "teacher", family)


def pair_of(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, build_teacher(open_teacher(folder))


@tied_or_not
@families
def test_logits_are_those_of_transformers(tmp_path, family, tied, ids):
    theirs, ours = pair_of(tiny.family_folder(tmp_path, family, tied=tied))
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids).logits
    assert 0.1 < expected.std() < 10
    assert (actual - expected).abs().max() < PARITY
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@families
def test_cached_logits_of_left_padded_rows(folder, ids):
    theirs, ours = pair_of(folder)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = RadladsCache(ours.config)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        pieces = [
            ours(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            for start, stop in [(0, 100), (100, 101), (101, LENGTH)]
        ]
    error = (torch.cat(pieces, dim=1) - expected)[mask.bool()].abs().max()
    assert error < PARITY


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"qk_norm": False}),
        ("llama3", {"rope_parameters": tiny.PLAIN_ROPE | {"rope_theta": 1e4}}),
        ("qwen2-linear", {"rope_parameters": tiny.PLAIN_ROPE}),
        ("qwen2-yarn", {"rope_parameters": tiny.PLAIN_ROPE}),
        ("qwen2-yarn", {"rope_parameters": tiny.YARN_ROPE | {"attention_factor": 1.0}}),
    ],
    ids=str,
)
def test_the_comparison_sees_norms_and_scaling(folder, changes, ids):
    theirs, ours = pair_of(folder)
    changed = RadladsForCausalLM(RadladsConfig.from_dict(ours.config.to_dict() | changes)).eval()
    changed.load_state_dict(ours.state_dict(), strict=False)
    with torch.no_grad():
        assert (changed(ids).logits - theirs(ids).logits).abs().max() > 100 * PARITY


LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        LLAMA31 | {"original_max_position_embeddings": 8192},
        LLAMA31 | {"original_max_position_embeddings": 8192, "factor": 32.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        QWEN_YARN,
        QWEN_YARN | {"factor": 1.0},
        QWEN_YARN | {"attention_factor": 1.25},
        QWEN_YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        QWEN_YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
        QWEN_YARN | {"original_max_position_embeddings": 4},
    ],
    ids=str,
)
def test_frequencies_and_factor_are_those_of_transformers(rope, size):
    sizes = {"hidden_size": 2 * size, "num_attention_heads": 2, "max_position_embeddings": 131072}
    theirs = Qwen2Config(**sizes, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, device="cpu")
    ours = RadladsConfig(**sizes, rope_parameters=dict(rope))
    torch.testing.assert_close(torch.tensor(rope_inverse_frequencies(ours)), expected, rtol=2e-6, atol=0)
    assert rope_attention_factor(ours) == pytest.approx(factor)


@pytest.mark.parametrize("form", ["rope_type", "type"])
@pytest.mark.parametrize("rope", [tiny.LLAMA3_ROPE, tiny.YARN_ROPE, tiny.LINEAR_ROPE, tiny.PLAIN_ROPE], ids=str)
def test_the_rope_of_a_transformers_4_configuration(tmp_path, rope, form):
    values = LlamaConfig(**tiny.SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_parameters": None}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    values["rope_theta"] = rope["rope_theta"]
    values["rope_scaling"] = {form: rope["rope_type"], **scaling} if scaling else None
    assert teacher_config(values, tmp_path).rope_parameters == rope


def test_a_context_that_yarn_does_not_name_is_the_configurations(tmp_path):
    rope = {"type": "yarn", "factor": 4.0}
    values = LlamaConfig(**tiny.SIZES).to_dict() | {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": rope}
    assert teacher_config(values, tmp_path).rope_parameters["original_max_position_embeddings"] == 512


def test_whole_numbers_are_read_as_numbers(tmp_path):
    values = LlamaConfig(**tiny.SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_parameters": None}
    config = teacher_config(values | {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2}}, tmp_path)
    assert config.rope_theta == 500000
    assert rope_inverse_frequencies(config)[0] == 0.5


def test_a_qwen3_without_head_dim_has_128(tmp_path):
    values = LlamaConfig(**tiny.SIZES).to_dict() | {"architectures": ["Qwen3ForCausalLM"], "head_dim": None}
    assert teacher_config(values, tmp_path).head_dim == 128


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
TWO_ROPES = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": tiny.PLAIN_ROPE | {"rope_theta": 5e5},
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"hidden_act": "swish"}),
        ("llama3", {"hidden_act": "swish"}),
        ("qwen2-yarn", WINDOW | {"max_window_layers": 3}),
        ("qwen3", WINDOW | {"max_window_layers": 28}),
        ("qwen3", WINDOW | {"sliding_window": None}),
        ("qwen3", WINDOW | {"layer_types": ["full_attention"] * 3}),
        ("llama-plain", TWO_ROPES),
        ("llama-plain", TWO_ROPES | {"rope_theta": 1e5}),
        ("llama3", {"original_max_position_embeddings": 32}),
        ("qwen2-yarn", {"original_max_position_embeddings": 32}),
    ],
    ids=str,
)
def test_configurations_in_other_words_are_read_as_transformers_reads_them(folder, changes, ids):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    theirs, ours = pair_of(folder)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < PARITY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (WINDOW | {"max_window_layers": 2}, "it uses sliding-window attention"),
        (WINDOW | {"max_window_layers": None}, "max_window_layers must be a number of layers, not None"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "uses sliding-window attention"),
        ({"layer_types": ["full_attention"]}, "has layer_types .* which are not 3 of full_attention"),
        ({"rope_parameters": {"full_attention": tiny.PLAIN_ROPE}}, "a RoPE of its own for full_attention"),
        ({"rope_parameters": tiny.LINEAR_ROPE, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": None},
            "its RoPE of type 'yarn' needs original_max_position_embeddings",
        ),
        ({"tie_word_embeddings": "false"}, "has tie_word_embeddings 'false', which is not true or false"),
    ],
    ids=str,
)
def test_configurations_that_would_be_misread_are_refused(tmp_path, changes, message):
    values = Qwen2Config(**tiny.SIZES).to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(ValueError, match=message):
        teacher_config(values | changes, tmp_path)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_biases_that_would_need_one_on_the_output_are_refused(tmp_path, architecture):
    values = LlamaConfig(**tiny.SIZES, attention_bias=True).to_dict() | {"architectures": [architecture]}
    with pytest.raises(ValueError, match="sets attention_bias, which is not supported"):
        teacher_config(values, tmp_path)


def test_qwen3_names_the_softmax_mixer_with_norms():
    config = RadladsConfig(num_hidden_layers=2, time_mixers=["qwen3", "rad_rwkv7"])
    assert config.qk_norm and config.time_mixers == ["qwen2", "rad_rwkv7"]
    assert config.layer_types == ["full_attention", "linear_attention"]


@pytest.mark.parametrize("tmix2", ["", "qwen2", "qwen3"])
def test_preserved_layers_are_the_teachers_whatever_the_name(tmp_path, tmix2, ids):
    source = open_teacher(tiny.family_folder(tmp_path, "qwen3"))
    student, _ = build_student(source, model_keys("rad_rwkv7", tmix2=tmix2, inv_other_layer_ratio=3))
    assert student.config.time_mixers == ["rad_rwkv7", "rad_rwkv7", "qwen2"]
    ours, theirs = student.model.layers[2].self_attn, build_teacher(source).model.layers[2].self_attn
    assert ours.state_dict().keys() == theirs.state_dict().keys() >= {"q_norm.weight", "k_norm.weight"}
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@mixers
@pytest.mark.parametrize("family", ["qwen3", "qwen3-yarn", "llama3"])
def test_a_students_receptances_keys_and_values_are_the_teachers(folder, mixer):
    """What enters the recurrence is what entered the softmax: normed, rotated, scaled, repeated over the groups."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student, _ = build_student(open_teacher(folder), model_keys(mixer))
    attention, size = theirs.model.layers[1].self_attn, student.config.head_dim
    x, positions = torch.randn(2, LENGTH, 64), torch.arange(LENGTH)[None]
    with torch.no_grad():
        q, k, v = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, size)) for name in "qkv")
        if student.config.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *theirs.model.rotary_emb(x, positions), unsqueeze_dim=2)
        shared = student.model.shared_inputs(x, None, None, None)
        actual = student.model.layers[1].self_attn.receptance_key_value(x, x, x, shared)
    for ours, expected in zip(actual, (q, k, v), strict=True):
        assert relative_error(ours, expected) < PARITY


@mixers
@families
def test_every_weight_of_both_sides_is_accounted_for(folder, mixer, family):
    source = open_teacher(folder)
    student, counts = build_student(source, model_keys(mixer))
    parameters = dict(student.named_parameters())
    rows = table(set(source.weights), set(parameters), student.config, tied=False, reinit_att=False)
    assert {row.student for row in rows if row.student} == set(parameters)
    assert {row.teacher for row in rows if row.teacher} == set(source.weights)
    assert counts["copy"] == len(source.weights) and counts["drop"] == 0
    norms = [name for name in parameters if "q_norm" in name or "k_norm" in name]
    assert len(norms) == (6 if "qwen3" in family else 0)
    assert all(torch.equal(parameters[name], source.weights[name]) for name in norms)


def test_reinit_att_leaves_the_norms_behind_too(tmp_path):
    source = open_teacher(tiny.family_folder(tmp_path, "qwen3"))
    student, counts = build_student(source, model_keys("rad_rwkv7", reinit_att=1))
    assert counts["drop"] == 3 * 6
    assert (student.model.layers[1].self_attn.q_norm.weight == 1).all()


def test_a_teacher_without_its_norms_is_refused(tmp_path):
    folder = tiny.family_folder(tmp_path, "llama-plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"the teacher has no model\.layers\.0\.self_attn\.k_norm\.weight"):
        build_teacher(open_teacher(folder))


@mixers
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_alignment_trains_every_parameter_of_every_mixer(folder, mixer, ids):
    source = open_teacher(folder)
    student, teacher = moved(build_student(source, model_keys(mixer))[0]), build_teacher(source)
    for part in Align().parts(student, teacher, ids):
        part.objective.backward()
    mixing = {name: p.grad for name, p in student.named_parameters() if ".self_attn." in name}
    silent = [name for name, gradient in mixing.items() if gradient is None or not gradient.abs().max() > 0]
    assert silent == []


@mixers
@pytest.mark.parametrize("family", ["qwen3-yarn", "llama3"])
def test_decoding_is_the_whole_sequence(folder, mixer):
    """Chunked prefill, cached steps and the decoder's own step; rows of unequal length."""
    student = moved(build_student(open_teacher(folder), model_keys(mixer))[0])
    prompts = [list(range(1, 90)), list(range(50, 110))]
    continuation = torch.randint(256, (5, 2))
    tokens, mask = left_padded(prompts, student.device)
    step = RecurrentStep(student)
    with torch.inference_mode():
        step.load(prefill(student, tokens, mask=mask, piece=40)[1])
        stepped = torch.stack([step(token).clone() for token in continuation])
        whole = [
            student(torch.tensor([[*prompt, *continuation[:, row].tolist()]])).logits[0, len(prompt) :]
            for row, prompt in enumerate(prompts)
        ]
    assert relative_error(stepped, torch.stack(whole, dim=1)) < SPLIT


@mixers
@pytest.mark.parametrize("family", ["qwen3-yarn", "llama3"])
def test_a_saved_student_comes_back_bit_equal(folder, mixer, tmp_path, ids):
    student = moved(build_student(open_teacher(folder), model_keys(mixer))[0])
    (tmp_path / "saved").mkdir()
    save_model(student, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert loaded.config.rope_parameters == student.config.rope_parameters
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)


# One layer of each class of mixer
ALL_MIXERS = {"tmix2": "rad_rwkv7", "inv_other_layer_ratio": 1.5, "preserve_last_n_layers": 1}


@pytest.mark.parametrize("family", ["qwen3-yarn"])
def test_an_exported_student_loads_without_radlads(folder, tmp_path, ids):
    student = moved(build_student(open_teacher(folder), model_keys("rad_rwkv6", **ALL_MIXERS))[0])
    assert student.config.time_mixers == ["rad_rwkv6", "rad_rwkv7", "qwen2"]
    export(student, folder, tmp_path / "hf")
    assert reload_max_abs_diff(student, tmp_path / "hf", ids[0].tolist()) < PARITY


def test_a_student_of_a_tied_teacher_is_tied_again(tmp_path, ids):
    folder = tiny.family_folder(tmp_path / "teacher", "llama3", tied=True)
    source = open_teacher(folder)
    student = moved(build_student(source, model_keys("rad_rwkv6", **ALL_MIXERS))[0])
    assert not student.config.tie_word_embeddings
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)
    with torch.no_grad():
        hidden = student.model(ids).last_hidden_state
    retie(student, source)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, hidden @ student.model.embed_tokens.weight.T)
    export(student, folder, tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")
    loaded = load_model(tmp_path / "hf")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert reload_max_abs_diff(student, tmp_path / "hf", ids[0].tolist()) < PARITY


def test_retying_where_nothing_was_tied_is_refused(tmp_path):
    source = open_teacher(tiny.family_folder(tmp_path, "qwen3"))
    student, _ = build_student(source, model_keys("rad_rwkv7"))
    with pytest.raises(ValueError, match="has a head of its own"):
        retie(student, source)
    assert student.lm_head.weight is not student.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3", False), ("qwen2-yarn", False), ("llama3", True), ("qwen2-linear", True)]
)
def test_only_what_the_fused_kernels_know_is_fused(tmp_path, family, expected):
    config = open_teacher(tiny.family_folder(tmp_path, family)).config
    config.head_dim = 64
    assert can_be_fused(RadladsForCausalLM(student_config(config, model_keys("rad_rwkv7"))), 1) == expected
