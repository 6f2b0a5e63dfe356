"""Published checkpoints: read as our models, written from them, and weights files that stages start from."""

import json

import pytest
import tiny
import torch
from root_scripts import run_script
from safetensors.torch import load_file, save_file

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.pth import PthFile
from radlads.checkpoint.published import published_config
from radlads.checkpoint.published_export import convert_to_published, write_published
from radlads.checkpoint.weight_files import convert_to_pth, convert_to_safetensors, open_weights
from radlads.checkpoint.weights import ModelWeights
from radlads.config.schema import ModelConfig
from radlads.convert.bare_weights import shape_of
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes.single_stage import train_stage

# As transformers 4 wrote them; the code that auto_map points at must never be asked for
QRWKV = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
    "bos_token_id": 256,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "max_window_layers": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 54321.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 260,
}
QRWKV6 = QRWKV | {"architectures": ["RWKV6Qwen2ForCausalLM"], "model_type": "rwkv6qwen2"}
QRWKV7 = QRWKV | {"architectures": ["RWKV7Qwen2ForCausalLM"], "model_type": "rwkv7qwen2"}
KINDS = {"6": QRWKV6, "7": QRWKV7}

STUDENTS = {
    "6": ModelConfig(tmix="rad_rwkv6", use_pos_emb=0, groupnorm_att=0),
    "6 as its ablations": ModelConfig(tmix="rad_rwkv6", gate_rank_type=2, use_tokenshift=0, balance_state=0),
    "6 without a gate": ModelConfig(tmix="rad_rwkv6", gate_rank_type=0, groupnorm_att=0),
    "7 balanced": ModelConfig(gate_rank_type=2, groupnorm_att=0),
    "7 group-normed": ModelConfig(gate_rank_type=2, balance_state=0),
    "7 with softmax": ModelConfig(gate_rank_type=2, balance_state=0, preserve_last_n_layers=1),
}


def test_a_window_is_refused_in_a_sentence(teacher, tmp_path):
    student = random_student(teacher, ModelConfig(gate_rank_type=2, groupnorm_att=0, mixer={"window_tokens": 8}))
    with pytest.raises(ValueError, match=r"^the published format does not hold .* softmax window .* instead$"):
        export_published(student, tmp_path / "out", shard_bytes=50_000)


def random_student(teacher, model):
    student, _ = build_student(open_teacher(teacher), model)
    torch.manual_seed(11)
    for parameter in student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return student.eval()


def write_folder(folder, values, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "model.safetensors")
    return folder


def change(folder, config=(), weights=lambda weights: None):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | dict(config)
    tensors = load_file(folder / "model.safetensors")
    weights(tensors)
    path.unlink()
    (folder / "model.safetensors").unlink()
    return write_folder(folder, values, tensors)


def export_published(student, folder, **options):
    folder.mkdir()
    write_published(student.config, ModelWeights(student), folder, **options)


TOKENS = torch.arange(40).view(2, 20) * 5 % 260


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_published_export_comes_back_with_the_same_logits(teacher, tmp_path, kind):
    student = random_student(teacher, STUDENTS[kind])
    export_published(student, tmp_path / "out", shard_bytes=50_000)
    loaded = load_model(tmp_path / "out")
    assert torch.equal(loaded(TOKENS).logits, student(TOKENS).logits)
    assert loaded.config.time_mixers == student.config.time_mixers


@pytest.mark.parametrize("kind", ["6", "7 balanced", "7 with softmax"])
def test_from_pretrained_of_a_published_folder_is_refused_in_one_sentence(teacher, tmp_path, kind):
    export_published(random_student(teacher, STUDENTS[kind]), tmp_path / "out")
    with pytest.raises(ValueError, match=rf"model type 'rwkv{kind[0]}qwen2', not 'radlads': .*load_model"):
        RadladsForCausalLM.from_pretrained(tmp_path / "out")


def test_from_pretrained_of_a_teacher_is_refused(teacher):
    with pytest.raises(ValueError, match="model type 'qwen2', not 'radlads'"):
        RadladsForCausalLM.from_pretrained(teacher)


def mixer_shapes(folder, layer):
    prefix = f"model.layers.{layer}.self_attn."
    weights = open_weights(folder)
    return {name.removeprefix(prefix): weights.info(name).shape for name in weights if name.startswith(prefix)}


PROJECTIONS = {
    **{f"{name}_proj.weight": (rows, 64) for name, rows in [("q", 64), ("k", 32), ("v", 32), ("o", 64)]},
    **{f"{name}_proj.bias": (rows,) for name, rows in [("q", 64), ("k", 32), ("v", 32)]},
}
RWKV7_TENSORS = {
    **PROJECTIONS,
    **{f"{name}0": (1, 1, 64) for name in "wav"},
    **{f"{name}1": (64, 32) for name in "wavg"},
    **{f"{name}2": (32, 64) for name in "wavg"},
    **{"k_k": (1, 1, 64), "k_a": (1, 1, 64), "r_k": (4, 16)},
}
RWKV6_TENSORS = {
    **PROJECTIONS,
    **{f"time_maa_{name}": (1, 1, 64) for name in "xrkvwg"},
    **{"time_maa_w1": (64, 160), "time_maa_w2": (5, 32, 64)},
    **{"time_decay": (1, 1, 64), "time_decay_w1": (64, 32), "time_decay_w2": (32, 64)},
}
GROUP_NORM = {"ln_x.weight": (64,), "ln_x.bias": (64,)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("6", RWKV6_TENSORS | {"gate.weight": (64, 64)}),
        ("6 as its ablations", RWKV6_TENSORS | GROUP_NORM | {"g1": (64, 32), "g2": (32, 64)}),
        ("6 without a gate", RWKV6_TENSORS),
        ("7 balanced", RWKV7_TENSORS),
        ("7 group-normed", RWKV7_TENSORS | GROUP_NORM),
    ],
)
def test_an_export_holds_every_tensor_of_the_format_in_every_layer(teacher, tmp_path, kind, expected):
    export_published(random_student(teacher, STUDENTS[kind]), tmp_path / "out")
    for layer in range(3):
        assert mixer_shapes(tmp_path / "out", layer) == expected
    assert "lm_head.weight" in open_weights(tmp_path / "out")


GATES = {0: {}, 1: {"gate.weight": (64, 64)}, 2: {"g1": (64, 32), "g2": (32, 64)}}
NO_TOKEN_SHIFT = {name: shape for name, shape in RWKV6_TENSORS.items() if "time_maa" not in name}
NO_GATE_7 = {name: shape for name, shape in RWKV7_TENSORS.items() if name not in ("g1", "g2")}
LAYER_NORMS = ("input", "post_attention")
OUTSIDE = {
    **{"model.embed_tokens.weight": (260, 64), "lm_head.weight": (260, 64), "model.norm.weight": (64,)},
    **{f"model.layers.{layer}.mlp.{name}_proj.weight": (96, 64) for layer in range(3) for name in ("gate", "up")},
    **{f"model.layers.{layer}.mlp.down_proj.weight": (64, 96) for layer in range(3)},
    **{f"model.layers.{layer}.{name}_layernorm.weight": (64,) for layer in range(3) for name in LAYER_NORMS},
}
# What the released training code builds a student with, by its keys
RELEASED_MIXERS = {
    "6": ({"groupnorm_att": 0}, RWKV6_TENSORS | GATES[1]),
    "6 normed": ({"balance_state": 0, "gate_rank_type": 2}, RWKV6_TENSORS | GROUP_NORM | GATES[2]),
    "6 without token shift": ({"use_tokenshift": 0, "groupnorm_att": 0}, NO_TOKEN_SHIFT | GATES[1]),
    "6 without a gate": ({"gate_rank_type": 0, "groupnorm_att": 0}, RWKV6_TENSORS),
    "7 balanced": ({"gate_rank_type": 2, "groupnorm_att": 0}, NO_GATE_7 | GATES[2]),
    "7 normed": ({"gate_rank_type": 2, "balance_state": 0}, NO_GATE_7 | GROUP_NORM | GATES[2]),
    "7 with a full gate": ({"gate_rank_type": 1, "groupnorm_att": 0}, NO_GATE_7 | GATES[1]),
    "7 with softmax": ({"gate_rank_type": 2, "preserve_last_n_layers": 1}, NO_GATE_7 | GROUP_NORM | GATES[2]),
}


@pytest.mark.parametrize("source", ["stage", "published"])
@pytest.mark.parametrize("kind", RELEASED_MIXERS)
def test_a_pth_file_has_the_tensors_of_the_released_code(teacher, tmp_path, kind, source):
    keys, mixer = RELEASED_MIXERS[kind]
    student = random_student(teacher, ModelConfig(tmix=f"rad_rwkv{kind[0]}", **keys))
    (tmp_path / "stage").mkdir()
    save_model(student, tmp_path / "stage")
    export_published(student, tmp_path / "published")
    convert_to_pth(tmp_path / source, tmp_path / "x.pth")
    layers = [mixer, mixer, PROJECTIONS if "softmax" in kind else mixer]
    expected = OUTSIDE | {
        f"model.layers.{layer}.self_attn.{name}": shape
        for layer, tensors in enumerate(layers)
        for name, shape in tensors.items()
    }
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    parameters = dict(student.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in parameters.items())


def test_a_pth_file_of_a_student_whose_head_is_its_embedding_has_a_head(teacher, tmp_path):
    student = random_student(teacher, STUDENTS["6"])
    student.lm_head.weight, student.config.tie_word_embeddings = student.model.embed_tokens.weight, True
    save_model(student, tmp_path)
    convert_to_pth(tmp_path, tmp_path / "x.pth")
    assert torch.equal(PthFile(tmp_path / "x.pth")["lm_head.weight"], student.model.embed_tokens.weight)


def test_a_student_may_be_known_by_its_model_type_alone(teacher, tmp_path):
    (tmp_path / "stage").mkdir()
    save_model(random_student(teacher, STUDENTS["7 balanced"]), tmp_path / "stage")
    convert_to_pth(tmp_path / "stage", tmp_path / "named.pth")
    values = json.loads((tmp_path / "stage" / "config.json").read_text())
    del values["architectures"]
    (tmp_path / "stage" / "config.json").write_text(json.dumps(values))
    convert_to_pth(tmp_path / "stage", tmp_path / "x.pth")
    assert set(PthFile(tmp_path / "x.pth")) == set(PthFile(tmp_path / "named.pth"))
    convert_to_safetensors(tmp_path / "stage", tmp_path / "out")
    assert (tmp_path / "out" / "modeling.py").is_file()


def test_a_pth_file_of_a_teacher_is_its_weights(teacher, tmp_path):
    convert_to_pth(teacher, tmp_path / "x.pth")
    assert set(PthFile(tmp_path / "x.pth")) == set(open_weights(teacher))


def test_an_exported_configuration_speaks_the_formats_words(teacher, tmp_path):
    export_published(random_student(teacher, STUDENTS["7 with softmax"]), tmp_path / "out", dtype=torch.bfloat16)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["RWKV7Qwen2ForCausalLM"],
        "model_type": "rwkv7qwen2",
        "num_attention_layers": 1,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "use_rope": True,
        "gate_rank_type": 2,
        "balance_state": False,
        "groupnorm_att": True,
        "use_tokenshift": False,
        "attention_bias": True,
        "attention_output_bias": False,
        "lora_rank_decay": 32,
        "lora_rank_iclr": 32,
        "lora_rank_value_residual_mix": 32,
        "lora_rank_gate": 32,
        "torch_dtype": "bfloat16",
    }
    assert {name: values[name] for name in expected} == expected
    assert open_weights(tmp_path / "out").info("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("6", {"use_rope": False, "gate_rank_type": 1, "balance_state": True, "use_tokenshift": True}),
        ("6", {"groupnorm_att": False, "lora_rank_tokenshift": 32, "lora_rank_decay": 64}),
        ("7", {"use_rope": False, "gate_rank_type": 2, "balance_state": True, "use_tokenshift": False}),
        ("7", {"groupnorm_att": False, "attention_bias": True, "time_mixers": ["rad_rwkv7"] * 3}),
    ],
)
def test_missing_keys_have_the_formats_defaults(tmp_path, kind, expected):
    config = published_config(KINDS[kind], tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters["rope_theta"] == 54321.0


def test_wide_models_have_wider_ranks_by_default(tmp_path):
    config = published_config(QRWKV6 | {"hidden_size": 4096}, tmp_path)
    assert (config.lora_rank_tokenshift, config.lora_rank_decay) == (64, 128)


def test_ranks_and_switches_that_are_named_count(tmp_path):
    named = {"lora_rank_decay": 96, "lora_rank_gate": 416, "use_rope": True, "num_attention_layers": 2}
    config = published_config(QRWKV7 | named, tmp_path)
    assert (config.lora_rank_decay, config.lora_rank_gate, config.use_rope) == (96, 416, True)
    assert config.time_mixers == ["rad_rwkv7", "qwen2", "qwen2"]


def test_rwkv7_has_no_token_shift_whatever_the_configuration_says(tmp_path):
    assert not published_config(QRWKV7 | {"use_tokenshift": True}, tmp_path).use_tokenshift


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_4_folder_with_foreign_code_loads(tmp_path, kind):
    model = RadladsForCausalLM(published_config(KINDS[kind], tmp_path)).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder = write_folder(tmp_path / "hf", KINDS[kind], weights)
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    assert torch.equal(load_model(folder)(TOKENS).logits, model(TOKENS).logits)


def test_stored_only_tensors_may_be_absent(teacher, tmp_path):
    student = random_student(teacher, STUDENTS["7 balanced"])
    export_published(student, tmp_path / "out")

    def remove(weights):
        for name in list(weights):
            if name.endswith(("r_k", "k_k", "k_a")) or (".0.self_attn.v" in name and "proj" not in name):
                del weights[name]

    folder = change(tmp_path / "out", weights=remove)
    assert "v0" not in mixer_shapes(folder, 0)
    assert torch.equal(load_model(folder)(TOKENS).logits, student(TOKENS).logits)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v1", "model.layers.1.self_attn.a0", "lm_head.weight"])
def test_tensors_that_are_used_may_not_be_absent(teacher, tmp_path, name):
    export_published(random_student(teacher, STUDENTS["7 balanced"]), tmp_path / "out")
    folder = change(tmp_path / "out", weights=lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_model(folder)


def test_tensors_of_another_variant_are_not_ignored(teacher, tmp_path):
    export_published(random_student(teacher, STUDENTS["7 group-normed"]), tmp_path / "out")
    folder = change(tmp_path / "out", {"groupnorm_att": False})
    with pytest.raises(ValueError, match=r"holds .*ln_x\.bias"):
        load_model(folder)


@pytest.mark.parametrize(("head", "tied"), [("absent", True), ("equal", True), ("its own", False)])
def test_tied_heads(teacher, tmp_path, head, tied):
    student = random_student(teacher, STUDENTS["6"])
    if tied:
        student.lm_head.weight = student.model.embed_tokens.weight
        student.config.tie_word_embeddings = True
    export_published(student, tmp_path / "out")
    keep = (lambda weights: weights.pop("lm_head.weight")) if head == "absent" else (lambda weights: None)
    loaded = load_model(change(tmp_path / "out", {"tie_word_embeddings": True}, keep))
    assert loaded.config.tie_word_embeddings == tied
    assert torch.equal(loaded(TOKENS).logits, student(TOKENS).logits)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("7", {"hidden_size": None}, "lacks hidden_size"),
        ("7", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("7", {"attention_output_bias": True}, "bias on its attention output"),
        ("7", {"num_attention_layers": 4}, "4 softmax layers among 3"),
        (
            "7",
            {"num_attention_layers": 1, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            "sliding-window",
        ),
        ("6", {"rope_scaling": {"type": "longrope"}}, "longrope"),
    ],
)
def test_what_our_mixers_do_not_do_is_refused(tmp_path, kind, values, message):
    with pytest.raises(ValueError, match=message):
        published_config(KINDS[kind] | values, tmp_path)


SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_mixers": ["qwen2"] * 3}, "not of softmax alone"),
        ({"time_mixers": ["rad_rwkv6", "rad_rwkv7", "rad_rwkv7"]}, "not of rad_rwkv6 and rad_rwkv7"),
        ({"time_mixers": ["qwen2", "rad_rwkv7", "rad_rwkv7"]}, "at the end of the stack only"),
        ({"time_mixers": ["rad_rwkv6", "rad_rwkv6", "qwen2"]}, "no softmax layers beside RAD-RWKV6"),
        ({"gate_rank_type": 0}, "does not run without a gate"),
        (
            {"time_mixers": ["rad_rwkv7", "rad_rwkv7", "qwen2"], "use_rope": False},
            "does not run softmax layers in a model without RoPE",
        ),
        ({"head_dim": 32}, "share the hidden size evenly"),
        ({"qk_norm": True}, "no norms of queries and keys"),
    ],
)
def test_models_the_format_has_no_words_for_are_refused(tmp_path, values, message):
    save_model(RadladsForCausalLM(RadladsConfig(**SIZES, **values)), tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_to_published(tmp_path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def command(monkeypatch, capsys, *arguments):
    """Run convert_to_safetensors.py; its exit code and what it wrote to stderr."""
    return run_script(monkeypatch, "convert_to_safetensors.py", *arguments), capsys.readouterr().err


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_command_writes_a_stage_folder_as_a_published_checkpoint(teacher, tmp_path, monkeypatch, capsys, kind):
    student, stage = random_student(teacher, STUDENTS[kind]), tmp_path / "stage"
    stage.mkdir()
    save_model(student, stage)
    options = ["--published", "--tokenizer", teacher, "--shard-size", "50KB"]
    assert command(monkeypatch, capsys, stage, tmp_path / "out", *options) == (0, "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == f"rwkv{kind[0]}qwen2"
    assert not list((tmp_path / "out").glob("*.py")) and (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [257, 258, 259]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path / "out")(TOKENS).logits, student(TOKENS).logits)


def test_a_published_checkpoint_keeps_what_it_only_stores(teacher, tmp_path, monkeypatch, capsys):
    student = random_student(teacher, STUDENTS["7 balanced"])
    export_published(student, tmp_path / "hf")
    mixer = "model.layers.{}.self_attn.{}"
    names = [mixer.format(2, "r_k"), mixer.format(0, "v1"), mixer.format(1, "k_a")]

    def fill(weights):
        for number, name in enumerate(names, start=2):
            weights[name].fill_(number)

    change(tmp_path / "hf", weights=fill)
    options = ["--published", "--dtype", "bfloat16"]
    assert command(monkeypatch, capsys, tmp_path / "hf", tmp_path / "out", *options) == (0, "")
    weights = open_weights(tmp_path / "out")
    assert [weights[name].unique().tolist() for name in names] == [[2.0], [3.0], [4.0]]
    assert {weights.info(name).dtype for name in weights} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(load_model(tmp_path / "out")(TOKENS).logits, student.bfloat16().float()(TOKENS).logits)


def wrong_shape(weights):
    weights["model.norm.weight"] = torch.ones(63)


@pytest.mark.parametrize(
    ("broken", "arguments", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["out"], "has no config.json"),
        (lambda folder: change(folder, weights=lambda w: w.pop("model.norm.weight")), ["out"], "lacks model.norm"),
        (lambda folder: change(folder, weights=wrong_shape), ["out"], "has shape (63,)"),
        (lambda folder: change(folder, {"hidden_size": "64"}), ["out"], "config.json describes no model"),
        (lambda folder: change(folder, {"gate_rank_type": 7}), ["out"], "gate_rank_type must be"),
        (lambda folder: change(folder, {"rope_parameters": {"rope_type": "warp"}}), ["out"], "'warp'"),
        (lambda folder: (folder.parent / "out").mkdir(), ["out"], "out exists already"),
        (lambda folder: None, ["out.safetensors"], "a published checkpoint is a folder"),
        (lambda folder: None, ["out", "--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
        (lambda folder: None, ["out", "--shard-size", "5 TB"], "a shard's size"),
    ],
)
def test_what_cannot_be_published_is_one_sentence(teacher, tmp_path, monkeypatch, capsys, broken, arguments, message):
    (tmp_path / "stage").mkdir()
    save_model(random_student(teacher, STUDENTS["7 balanced"]), tmp_path / "stage")
    broken(tmp_path / "stage")
    monkeypatch.chdir(tmp_path)
    code, said = command(monkeypatch, capsys, "stage", *arguments, "--published")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("convert_to_safetensors.py: ") and message in said
    assert not list(tmp_path.glob("out*/*")) and not list(tmp_path.glob("*.partial"))


def stage(corpus_folder, out, kind, **overrides):
    keys = {f"train.{key}": value for key, value in overrides.items() if not key.startswith("model_")}
    keys |= {f"model.{key.removeprefix('model_')}": value for key, value in overrides.items() if key[:6] == "model_"}
    keys |= {"train.proj_dir": str(out), "train.proj_name": kind}
    return train_stage(tiny.stage_config(corpus_folder, kind, **keys), tiny.Silent()).folder


def test_three_stages_start_from_weights_files(teacher, corpus_folder, tmp_path):
    sizes = {"model_n_layer": 3, "model_n_embd": 64, "model_head_size": 16}
    convert_to_pth(teacher, tmp_path / "teacher.pth")
    start, hf = str(tmp_path / "teacher.pth"), {"teacher.hf_path": str(teacher)}
    aligned = stage(corpus_folder, tmp_path, "align", load_model=start, **hf)
    assert "setup of" in json.loads((aligned / "manifest.json").read_text())["parent"]
    projection = "model.layers.1.self_attn.o_proj.weight"
    convert_to_pth(aligned, tmp_path / "1.pth")
    as_teacher = {"teacher.path": start, "teacher.hf_path": str(teacher)}
    distilled = stage(corpus_folder, tmp_path, "distill", load_model=str(tmp_path / "1.pth"), **as_teacher)
    assert not torch.equal(PthFile(tmp_path / "1.pth")[projection], PthFile(tmp_path / "teacher.pth")[projection])
    extended = stage(corpus_folder, tmp_path, "extend", load_model=str(distilled / "model.safetensors"), **sizes)
    assert load_model(extended).config.time_mixers == ["rad_rwkv7"] * 3


def test_a_published_checkpoint_is_a_stages_start_in_every_form(teacher, corpus_folder, tmp_path):
    export_published(random_student(teacher, STUDENTS["7 balanced"]), tmp_path / "hf")
    convert_to_pth(tmp_path / "hf", tmp_path / "x.pth")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").symlink_to(tmp_path / "hf" / "model.safetensors")
    weights = []
    for number, source in enumerate(["hf", "x.pth", "bare", "hf/model.safetensors"]):
        start = {"load_model": str(tmp_path / source), "teacher.hf_path": str(teacher), "my_exit_tokens": 64}
        folder = stage(corpus_folder, tmp_path / str(number), "distill", **start)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2] == weights[3]


def test_a_teachers_weights_are_no_start_for_distilling(teacher, corpus_folder, tmp_path):
    convert_to_pth(teacher, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"lacks .*a0"):
        stage(
            corpus_folder,
            tmp_path,
            "distill",
            load_model=str(tmp_path / "teacher.pth"),
            **{"teacher.hf_path": str(teacher)},
        )


def test_the_shape_of_weights_is_the_teachers(teacher):
    found = shape_of(open_weights(teacher), ModelConfig(n_layer=3, n_embd=64, head_size=16), teacher)
    expected = open_teacher(teacher).config
    for name in (*SIZES, "num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings", "time_mixers"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "3 layers of width 64, but the configuration says 6 of width 512"),
        ({"n_layer": 3, "n_embd": 64, "head_size": 48}, "head_size is 48"),
    ],
)
def test_a_shape_that_is_not_configured_is_refused(teacher, keys, message):
    with pytest.raises(ValueError, match=message):
        shape_of(open_weights(teacher), ModelConfig(**keys), teacher)


def test_weights_of_something_else_have_no_shape(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"lacks the matrix model\.embed_tokens"):
        shape_of(open_weights(tmp_path / "x.safetensors"), ModelConfig(), tmp_path / "x.safetensors")


def test_a_start_of_other_sizes_than_configured_is_refused(teacher, corpus_folder, tmp_path):
    convert_to_pth(teacher, tmp_path / "teacher.pth")
    start = {"load_model": str(tmp_path / "teacher.pth"), "teacher.hf_path": str(teacher)}
    with pytest.raises(ValueError, match=r"model\.n_layer .*4"):
        stage(corpus_folder, tmp_path, "align", model_n_layer=4, **start)


def test_released_names_of_a_start_mean_ours(teacher, corpus_folder, tmp_path):
    hf = {"teacher.hf_path": str(teacher), "my_exit_tokens": 64}
    aligned = stage(corpus_folder, tmp_path, "align", load_model="auto", **hf)
    distilled = stage(corpus_folder, tmp_path, "distill", load_model=f"{aligned}/rwkv-final.pth", **hf)
    assert json.loads((distilled / "manifest.json").read_text())["parent"].startswith(f"{aligned} sha256:")
    with pytest.raises(ValueError, match="starts from an earlier stage's model: name its folder"):
        stage(corpus_folder, tmp_path / "2", "distill", load_model="auto", **hf)
    with pytest.raises(ValueError, match=r"rwkv-7\.pth does not exist: name a \.pth file"):
        stage(corpus_folder, tmp_path / "2", "distill", load_model=f"{aligned}/rwkv-7.pth", **hf)
