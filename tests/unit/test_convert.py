"""Teacher folders in, weights across: parity, full accounting, refusals."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.tokenizer_files import locate_tokenizer
from radlads.config.load import load_config
from radlads.convert.hf_source import end_of_text_id, load_tokenizer, open_teacher
from radlads.convert.student import build_student, build_teacher, student_config
from radlads.convert.weight_map import table
from radlads.model.registry import build_time_mixer


def model_keys(**keys):
    return load_config([], {f"model.{key}": value for key, value in keys.items()}).model


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_an_all_softmax_student_gives_the_teachers_logits(tmp_path, tied):
    folder = tiny.teacher_folder(tmp_path / "teacher", tied=tied)
    student, _ = build_student(open_teacher(folder), model_keys(tmix="qwen2"))
    tokens = torch.randint(256, (2, 33))
    expected = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_both_sides_is_accounted_for(tmp_path, mixer, tied):
    source = open_teacher(tiny.teacher_folder(tmp_path / "teacher", tied=tied))
    student, counts = build_student(source, model_keys(tmix=mixer))
    names = {name for name, _ in student.named_parameters()}
    rows = table(set(source.weights), names, student.config, tied=tied, reinit_att=False)
    assert {row.student for row in rows if row.student} == names
    assert {row.teacher for row in rows if row.teacher} == set(source.weights)
    assert counts["copy"] + counts["transform"] + counts["fresh"] == len(names)
    assert counts["transform"] == (1 if tied else 0)


def test_copied_weights_are_the_teachers_and_fresh_ones_are_not_from_it(teacher):
    source = open_teacher(teacher)
    student, _ = build_student(source, model_keys(tmix="rad_rwkv7"))
    parameters = dict(student.named_parameters())
    name = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(parameters[name], source.weights[name])
    assert (parameters["model.layers.1.self_attn.a0"] == 0).all()


FRESH_VARIANTS = [
    {"tmix": mixer, "gate_rank_type": gate, "groupnorm_att": norm, "balance_state": 1 - norm, "use_tokenshift": shift}
    for mixer, shift in (("rad_rwkv6", 0), ("rad_rwkv6", 1), ("rad_rwkv7", 0))
    for gate in (0, 1, 2)
    for norm in (0, 1)
]


@pytest.mark.parametrize("keys", FRESH_VARIANTS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_fresh_values_are_those_of_a_mixer_that_is_built_directly(teacher, keys):
    torch.manual_seed(3)
    student, _ = build_student(open_teacher(teacher), model_keys(**keys))
    torch.manual_seed(3)
    for layer, block in enumerate(student.model.layers):
        direct = dict(build_time_mixer(student.config, layer).named_parameters())
        for name, parameter in block.self_attn.named_parameters():
            assert torch.equal(parameter, direct[name]) or "_proj" in name, name


def test_a_full_rank_gate_is_one_half_after_setup(teacher):
    for mixer in ("rad_rwkv6", "rad_rwkv7"):
        student, _ = build_student(open_teacher(teacher), model_keys(tmix=mixer, gate_rank_type=1))
        assert not any(block.self_attn.gate.weight.any() for block in student.model.layers)


def test_a_users_mixer_keeps_the_values_that_its_constructor_sets(teacher, tmp_path, monkeypatch):
    (tmp_path / "tmix").mkdir()
    (tmp_path / "tmix" / "tmix_half.py").write_text(
        "import torch\n"
        "from radlads.model.rad_rwkv6 import RadRwkv6\n"
        "class TMix_half(RadRwkv6):\n"
        "    def __init__(self, config, layer_idx):\n"
        "        super().__init__(config, layer_idx)\n"
        "        self.own = torch.nn.Linear(2, 3)\n"
        "        torch.nn.init.constant_(self.own.weight, 7.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    student, _ = build_student(open_teacher(teacher), model_keys(tmix="half"))
    assert all((block.self_attn.own.weight == 7.0).all() for block in student.model.layers)


def test_reinit_att_leaves_the_teachers_projections_behind(teacher):
    source = open_teacher(teacher)
    student, counts = build_student(source, model_keys(tmix="rad_rwkv7", reinit_att=1))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert counts["drop"] == 3 * 7
    assert not torch.equal(dict(student.named_parameters())[name], source.weights[name])


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_reinit_att_draws_the_released_codes_values(teacher, mixer):
    student, _ = build_student(open_teacher(teacher), model_keys(tmix=mixer, reinit_att=1))
    for block in student.model.layers:
        attention = block.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert 0.99 * 0.5 / 8 < projection.weight.abs().max() <= 0.5 / 8  # 64 channels
            assert projection.weight.std().item() == pytest.approx(0.5 / 8 / 3**0.5, rel=0.05)
            assert not projection.bias.any()
        assert not attention.o_proj.weight.any()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tmix": "qwerky7", "inv_other_layer_ratio": 3}, ["rad_rwkv7", "rad_rwkv7", "qwen2"]),
        (
            {"tmix": "rad_rwkv6", "tmix2": "rad_rwkv7", "inv_other_layer_ratio": 1.5},
            ["rad_rwkv6", "rad_rwkv7", "rad_rwkv7"],
        ),
        ({"tmix": "rad_rwkv6", "preserve_last_n_layers": 2}, ["rad_rwkv6", "qwen2", "qwen2"]),
        ({"tmix": "rad_rwkv6", "tmix2": "qwen2"}, ["rad_rwkv6"] * 3),
    ],
)
def test_layers_take_the_mixers_the_configuration_sets_apart(teacher, keys, expected):
    assert student_config(open_teacher(teacher).config, model_keys(**keys)).time_mixers == expected


def test_preserving_more_layers_than_there_are_is_refused(teacher):
    with pytest.raises(ValueError, match="preserve_last_n_layers is 4, but there are 3"):
        student_config(open_teacher(teacher).config, model_keys(preserve_last_n_layers=4))


def test_a_folder_without_weights_is_refused(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        open_teacher(folder)


def test_truncated_weights_are_refused(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        open_teacher(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "names GPT2LMHeadModel, but only Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "no architecture"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None},
            "sliding-window",
        ),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "copy/config.json .* RoPE scaling 'dynamic' is not supp",
        ),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "type 'yarn' needs a positive factor, not None"),
        ({"rope_parameters": "yarn"}, "copy/config.json describes no teacher we can read"),
        ({"rope_scaling": 3}, "copy/config.json describes no teacher we can read"),
        ({"mlp_bias": True}, "sets mlp_bias, which is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_teachers_we_cannot_read_are_refused_by_name(teacher, tmp_path, values, message):
    folder = copy_of(teacher, tmp_path)
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        open_teacher(folder)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_config_that_is_none_is_refused(teacher, tmp_path, content):
    folder = copy_of(teacher, tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_teacher(folder)


def test_an_older_configuration_with_rope_theta_at_the_top_is_read(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    change_config(folder, rope_parameters=None, rope_theta=54321.0)
    assert open_teacher(folder).config.rope_parameters["rope_theta"] == 54321.0


@pytest.mark.parametrize("opened", [open_teacher, locate_tokenizer])
@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "nothing"])
def test_neither_folder_nor_hub_name(name, opened):
    with pytest.raises(ValueError, match="is no folder, GGUF file, named model"):
        opened(name)


@pytest.mark.parametrize("opened", [open_teacher, locate_tokenizer])
@pytest.mark.parametrize("name", ["owner/name", "owner/no name"])
def test_a_hub_name_that_cannot_be_fetched(name, opened):
    with pytest.raises(ValueError, match="could not be fetched from the hub"):
        opened(name)


@pytest.mark.parametrize(
    ("opened", "what"),
    [(open_teacher, "config.json and the safetensors weights"), (locate_tokenizer, "tokenizer.json")],
)
def test_a_file_is_no_folder(tmp_path, opened, what):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"file is a file: give the folder that holds {what}"):
        opened(tmp_path / "file")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(NORM), "has no model.norm.weight"),
        (lambda weights: weights.pop("lm_head.weight"), "has no lm_head.weight"),
        (lambda weights: weights.update(extra=torch.ones(2)), "extra .* has no place in the student"),
        (lambda weights: weights.update({NORM: torch.ones(3)}), r"has shape \(3,\), but the model needs \(64,\)"),
        (lambda weights: weights.update({NORM: torch.full((64,), float("nan"))}), "model.norm.weight .* holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(teacher, tmp_path, change, message):
    folder = copy_of(teacher, tmp_path)
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        build_teacher(open_teacher(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(NORM), "lacks model.norm.weight"),
        (lambda weights: weights.update(extra=torch.ones(2)), "holds extra, which the model lacks"),
        (lambda weights: weights.update({NORM: torch.ones(3)}), "has shape"),
        (lambda weights: weights.update({NORM: torch.full((64,), float("inf"))}), "holds NaN or infinity"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(teacher, tmp_path, change, message):
    student, _ = build_student(open_teacher(teacher), model_keys(tmix="rad_rwkv6"))
    save_model(student, tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_saved_model_comes_back_bit_equal(teacher, tmp_path):
    student, _ = build_student(open_teacher(teacher), model_keys(tmix="rad_rwkv7", inv_other_layer_ratio=3))
    save_model(student, tmp_path)
    tokens = torch.randint(256, (2, 9))
    assert torch.equal(load_model(tmp_path)(tokens).logits, student.eval()(tokens).logits)


def test_a_missing_shard_is_named(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing"):
        open_teacher(folder)


def test_shards_are_read_through_their_index(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(build_teacher(open_teacher(folder)).model.norm.weight, weights[NORM])


def test_a_tokenizer_of_another_model_is_refused(teacher):
    with pytest.raises(ValueError, match="token with id 256, but the model's vocabulary ends at 99"):
        load_tokenizer(teacher, vocab_size=100)


def test_a_missing_or_broken_tokenizer_is_refused(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_tokenizer(folder, 300)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(folder, 300)


def test_the_end_of_text_id_comes_from_tokenizer_or_configuration(teacher, tmp_path):
    folder = copy_of(teacher, tmp_path)
    tokenizer = load_tokenizer(folder, 300)
    (folder / "tokenizer_config.json").write_text("{}")
    change_config(folder, eos_token_id=[42, 43])
    assert end_of_text_id(teacher, tokenizer) == 256
    assert end_of_text_id(folder, tokenizer) == 42


@pytest.mark.parametrize("ids", [[], None, "<|end|>"])
def test_a_folder_without_an_end_of_text_id_says_so(teacher, tmp_path, ids):
    folder = copy_of(teacher, tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
    change_config(folder, eos_token_id=ids)
    with pytest.raises(ValueError, match="names no end-of-text token: set eos_token_id"):
        end_of_text_id(folder, load_tokenizer(folder, 300))
