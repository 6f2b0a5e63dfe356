"""The committed configuration files, their sizes and order; and files as the released system has them."""

import json
import shlex
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from radlads.cli import main
from radlads.config import Config, load_config, parse_config
from radlads.config.schema import SIZE_KEYS, without_effect
from radlads.config.sizes import check_sizes, sizes_from_hf, sizes_of
from radlads.model.configuration import RadladsConfig
from radlads.recipes.single_stage import run_folder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QWEN25 = ("0b5", "1b5", "3b", "7b", "14b", "32b", "72b")
QWEN3 = ("8b", "14b", "32b")
STAGES = ("1", "2", "2a", "3", "3a", "3-1024", "3-2048", "3-4096", "3-8192", "3-16384")
NAMES = {
    *("qwen" + size + kind for size, kind in product(QWEN25, ("", "base", "teacher", "instructteacher"))),
    *("qwen3-" + size + kind for size, kind in product(QWEN3, ("", "teacher", "instructteacher"))),
    "qwq32bteacher",
    *("qwerky6", "qwerky7", "rad_rwkv6", "rad_rwkv7"),
    *("qwerky6_ablation_" + what for what in ("groupnorm", "no_gate", "no_tokenshift", "reinit_att", "use_rope")),
    *("distill" + stage for stage in STAGES),
}
# layers, hidden size, FFN, heads, kv heads, vocabulary, head size: the models' config.json
SIZES = {
    "qwen0b5": (24, 896, 4864, 14, 2, 151936, 64),
    "qwen1b5": (28, 1536, 8960, 12, 2, 151936, 128),
    "qwen3b": (36, 2048, 11008, 16, 2, 151936, 128),
    "qwen7b": (28, 3584, 18944, 28, 4, 152064, 128),
    "qwen14b": (48, 5120, 13824, 40, 8, 152064, 128),
    "qwen32b": (64, 5120, 27648, 40, 8, 152064, 128),
    "qwen72b": (80, 8192, 29568, 64, 8, 152064, 128),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, 128),
    "qwen3-14b": (40, 5120, 17408, 40, 8, 151936, 128),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 151936, 128),
}


def load(name):
    return load_config([CONFIGS / f"{name}.yaml"], {})


def hf_values(name, eps):
    layers, channels, ffn, heads, kv_heads, vocab, head_size = SIZES[name]
    return {
        "num_hidden_layers": layers,
        "hidden_size": channels,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "head_dim": head_size,
        "rms_norm_eps": eps,
        "rope_theta": 1000000.0,
    }


def sizes_in(section):
    return {key: getattr(section, key) for key in SIZE_KEYS if key != "rope"} | {"rope": {"base": section.rope.base}}


def test_every_committed_config_parses_and_none_has_an_idle_key():
    files = sorted(CONFIGS.iterdir())
    for file in files:
        assert file.read_text().startswith("# ")
        assert without_effect(load_config([file], {})) == []
    assert {file.name for file in files} == {f"{name}.yaml" for name in NAMES}
    assert len(files) == 57


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["", "teacher", "instructteacher"])
def test_sizes_are_those_of_the_model(name, kind):
    is_base = kind == "teacher" and name in ("qwen14b", "qwen32b", "qwen72b")
    config = load(name + kind)
    section = config.train.teacher.model if kind else config.model
    assert sizes_in(section) == sizes_of(hf_values(name, 1e-5 if is_base else 1e-6))


@pytest.mark.parametrize("size", QWEN25)
def test_base_models_have_the_sizes_of_their_teacher_file(size):
    assert sizes_in(load(f"qwen{size}base").model) == sizes_in(load(f"qwen{size}teacher").train.teacher.model)


def test_qwq_has_the_sizes_of_the_base_model():
    assert sizes_in(load("qwq32bteacher").train.teacher.model) == sizes_in(load("qwen32bbase").model)


@pytest.mark.parametrize(
    ("name", "hub_name", "tmix"),
    [
        ("qwen0b5instructteacher", "Qwen/Qwen2.5-0.5B-Instruct", "qwen2"),
        ("qwen72bteacher", "Qwen/Qwen2.5-72B", "qwen2"),
        ("qwq32bteacher", "Qwen/QwQ-32B", "qwen2"),
        ("qwen3-14bteacher", "Qwen/Qwen3-14B", "qwen3"),
        ("qwen3-8binstructteacher", "Qwen/Qwen3-8B", "qwen3"),
    ],
)
def test_teacher_files_name_the_teacher_and_leave_the_student_alone(name, hub_name, tmix):
    config = load(name)
    assert (config.train.teacher.hf_path, config.train.teacher.model.tmix) == (hub_name, tmix)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("name", "tokens_per_step"),
    [
        ("distill1", 32 * 512),
        ("distill2", 96 * 512),
        ("distill2a", 32 * 4096),
        ("distill3", 96 * 16384),
        *((f"distill3-{tokens}", 96 * tokens) for tokens in (1024, 2048, 4096, 8192, 16384)),
    ],
)
def test_global_batches_on_one_device(name, tokens_per_step):
    config = load(name)
    assert config.train.micro_bsz * config.train.accumulate_grad_batches * config.model.ctx_len == tokens_per_step


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_file_names_its_run_folder_by_its_own_stage(stage):
    assert load(f"distill{stage}").train.proj_suffix == stage


def test_released_and_paper_variants_of_rwkv7_differ():
    paper, released = (load(name).model for name in ("rad_rwkv7", "qwerky7"))
    assert (paper.balance_state, paper.groupnorm_att) == (1, 0)
    assert (released.balance_state, released.groupnorm_att) == (0, 1)


@pytest.mark.parametrize(
    ("what", "key", "value"),
    [
        ("groupnorm", "groupnorm_att", 1),
        ("no_gate", "gate_rank_type", 0),
        ("no_tokenshift", "use_tokenshift", 0),
        ("reinit_att", "reinit_att", 1),
        ("use_rope", "use_pos_emb", 1),
    ],
)
def test_an_ablation_differs_from_its_base_in_one_key(what, key, value):
    base, ablated = (
        load_config([CONFIGS / f"{name}.yaml"], {}).model for name in ("qwerky6", f"qwerky6_ablation_{what}")
    )
    assert getattr(base, key) != value
    assert {name: after for name, after in vars(ablated).items() if after != getattr(base, name)} == {key: value}


def documented_stages():
    """The configurations of the `train.py` commands in docs/paper_commands.md, in order."""
    text = (ROOT / "docs" / "paper_commands.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python3 train.py ")]
    return [parse_config(command[2:], write=pytest.fail) for command in commands]


def test_the_documented_stages_of_the_7b_example_follow_each_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = documented_stages()
    student = SimpleNamespace(num_hidden_layers=28, hidden_size=3584)
    folders = [str(run_folder(config, student)) for config in stages]
    assert folders == [f"out/L28-D3584-qwerky7_qwen2-{number}" for number in (1, 2, 3)]
    assert [config.train.load_model for config in stages[1:]] == folders[:2]
    assert [config.train.attention_distillation_stage for config in stages] == [1, 2, -1]
    assert [config.train.teacher.hf_path for config in stages] == ["Qwen/Qwen2.5-7B-Instruct"] * 2 + [""]


RELEASED = """\
__type__: configs.CLI_Config
model:
  __type__: configs.Transformer_Config
  hf_path: ''
  classname: qwen2
  tmix: qwerky7
  tmix2: qwen2
  # attention_type: rwkv7_wind_backstepping_bighead
  attention_type: rwkv7_fla_chunk
  vocab_padding_idx: 151643
  n_layer: 28
  n_embd: 3584
  rms_norm_eps: 1e-6
  rope:
    __type__: configs.RoPE_Config
    base: 1e6
  reinit_att: 0
  balance_state: 0
train:
  __type__: configs.Train_Config
  load_partial: 1
  train_stage: 2
  lr_init: 1e-3
  #lr_final: 3e-4
  lr_final: 1e-5
  adam_eps: 1e-8
  optimizer: dsfusedadamw
  ds_bucket_mb: 100
  val_check_interval: null
  devices: 8
  strategy: deepspeed_stage_1
  epoch_save: 1
  wandb: radlads
  teacher:
    __type__: configs.Teacher_Config
    kl_weight: 1
    ce_weight: 0
    model:
      __type__: configs.Transformer_Config
      tmix: qwen2
      ctx_len: 512
      n_layer: 28
"""


def test_a_file_of_the_released_system_loads_unchanged(tmp_path):
    (tmp_path / "released.yaml").write_text(RELEASED)
    config = parse_config(["-c", str(tmp_path / "released.yaml"), "--train.lr_init:", "6e-4"], write=pytest.fail)
    assert (config.train.lr_init, config.train.lr_final, config.train.devices) == (6e-4, 1e-5, 8)
    assert (config.model.rope.base, config.train.teacher.kl_weight) == (1e6, 1.0)
    assert without_effect(config) == [
        *("model.classname", "model.vocab_padding_idx", "model.attention_type"),
        *("train.load_partial", "train.train_stage", "train.epoch_save"),
        "train.teacher.model.ctx_len",
    ]


@pytest.mark.parametrize("command", [["train"], ["demo", "--teacher", "./nowhere", "--set"]])
def test_idle_keys_are_warned_of_once_and_together(command, capsys):
    option = "train.epoch_save=1" if "--set" in command else "--train.epoch_save=1"
    assert main([*command, option, *(["--model.classname=qwen2"] if command == ["train"] else [])]) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    keys = "train.epoch_save" if "--set" in command else "model.classname, train.epoch_save"
    assert warnings == [f"radlads: warning: no effect here: {keys}"]


HF_CONFIGS = [
    Qwen2Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
    Qwen3Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, rms_norm_eps=1e-5),
]


@pytest.mark.parametrize("hf", HF_CONFIGS, ids=lambda hf: hf.model_type)
def test_config_from_hf_prints_a_file_that_loads(hf, tmp_path, capsys):
    hf.save_pretrained(tmp_path)
    assert main(["config", "from-hf", str(tmp_path)]) == 0
    (tmp_path / "sizes.yaml").write_text(capsys.readouterr().out)
    model = load_config([tmp_path / "sizes.yaml"], {}).model
    assert (model.n_layer, model.n_embd, model.dim_ffn) == (3, 64, hf.intermediate_size)
    assert (model.vocab_size, model.rms_norm_eps) == (hf.vocab_size, hf.rms_norm_eps)
    assert (model.dim_att, model.head_size) == ((128, 32) if hf.model_type == "qwen3" else (64, 16))
    assert model.num_key_value_heads == hf.num_key_value_heads
    assert model.rope.base == hf.rope_parameters["rope_theta"]


def test_config_from_hf_reads_the_older_rope_key(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_values("qwen3-32b", 1e-6)))
    (tmp_path / "sizes.yaml").write_text(sizes_from_hf(tmp_path))
    assert load_config([tmp_path / "sizes.yaml"], {}) == load("qwen3-32b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json: give the folder of a Hugging Face model"),
        ("{", "config.json is damaged: it is not JSON"),
        ('{"vocab_size": 9, "num_hidden_layers": 1, "hidden_size": "64"}', "lacks hidden_size, intermediate_size, "),
        ("[]", "config.json is damaged: it holds no JSON object"),
        (
            '{"n_embd": 5, "vocab_size": 9}',
            "lacks num_hidden_layers, hidden_size, intermediate_size, num_attention_heads: ",
        ),
    ],
)
def test_config_from_hf_of_something_else(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["config", "from-hf", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def model_of(name):
    layers, channels, ffn, heads, kv_heads, vocab, head_size = SIZES[name]
    return RadladsConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        head_dim=head_size,
    ).to_dict()


@pytest.mark.parametrize("name", ["qwen0b5", "qwen7b", "qwen3-32b"])
def test_the_size_file_of_a_model_fits_it(name):
    check_sizes(load(name).model, "model", model_of(name))
    check_sizes(Config().model, "model", model_of(name))


@pytest.mark.parametrize(
    ("key", "value"), [("n_layer", 5), ("dim_att", 64), ("rope.base", 5.0), ("rms_norm_eps", 1e-5)]
)
def test_a_size_of_another_model_is_refused(key, value):
    config = load_config([CONFIGS / "qwen7b.yaml"], {f"model.{key}": value})
    with pytest.raises(ValueError, match=rf"^model\.{key} is {value}, but the model has .*: give the size file"):
        check_sizes(config.model, "model", model_of("qwen7b"))


def test_a_teachers_precision_is_idle_without_a_teacher():
    assert without_effect(load_config([], {"train.teacher_precision": "fp8"})) == ["train.teacher_precision"]
    named = {"train.teacher_precision": "fp8", "train.teacher.hf_path": "./teacher"}
    assert without_effect(load_config([], named)) == []
