"""The committed configuration files, their sizes and order; and files as the released system has them."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from radlads.cli import main
from radlads.config import Config, load_config, parse_config
from radlads.config.layer_lists import num_selected
from radlads.config.schema import SIZE_KEYS, stage_of, without_effect
from radlads.config.sizes import check_sizes, sizes_from_hf
from radlads.model.configuration import RadladsConfig
from radlads.recipes.single_stage import run_folder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QWEN25 = ("0b5", "1b5", "3b", "7b", "14b", "32b", "72b")
QWEN3 = ("8b", "14b", "32b")
STAGES = ("1", "2", "3", "3-1024", "3-2048", "3-4096", "3-8192", "3-16384")
PAPER_STAGES = ("1", "2", "2a", "3", "3a")
KEEP_STAGES = ("align", "distill", "extend")
NAMES = {
    *("qwen" + size + kind for size, kind in product(QWEN25, ("", "base", "teacher", "instructteacher"))),
    *("qwen3-" + size + kind for size, kind in product(QWEN3, ("", "teacher", "instructteacher"))),
    *("qwq32bteacher", "qwen0b5hf", "qwen0b5hfbase", "qwen0b5hfteacher", "qwen7bhf", "qwen7bhfteacher"),
    *("qwerky6", "qwerky7", "rad_rwkv6", "rad_rwkv7"),
    *("qwerky6_ablation_" + what for what in ("groupnorm", "no_gate", "no_tokenshift", "reinit_att", "use_rope")),
    *("distill" + stage for stage in STAGES),
    *("paper_distill" + stage for stage in PAPER_STAGES),
    *("keep_" + stage for stage in KEEP_STAGES),
    "instruct",
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
    assert len(files) == 69


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["", "teacher", "instructteacher"])
def test_sizes_are_those_of_the_model(name, kind):
    is_base = kind == "teacher" and name in ("qwen14b", "qwen32b", "qwen72b")
    config = load(name + kind)
    section = config.train.teacher.model if kind else config.model
    check_sizes(section, name, hf_values(name, 1e-5 if is_base else 1e-6))
    assert (section.n_layer, section.n_embd) == SIZES[name][:2]


@pytest.mark.parametrize("size", QWEN25)
def test_base_models_have_the_sizes_of_their_teacher_file(size):
    model, teacher = load(f"qwen{size}base").model, load(f"qwen{size}teacher").train.teacher.model
    eps = "rms_norm_eps"  # the published 14B teacher's is not its model's
    assert sizes_in(model) | {eps: 0} == sizes_in(teacher) | {eps: 0}


def test_qwq_has_the_sizes_of_the_base_model():
    assert sizes_in(load("qwq32bteacher").train.teacher.model) == sizes_in(load("qwen32bbase").model)


@pytest.mark.parametrize(
    ("name", "named", "tmix"),
    [
        ("qwen0b5instructteacher", ("", "Qwen/Qwen2.5-0.5B-Instruct"), "qwen2"),
        ("qwen72bteacher", ("out/qwen2.5-72B.pth", ""), "qwen2"),
        ("qwen3-14bteacher", ("out/Qwen3-14B.pth", ""), "qwen3"),
        ("qwen3-8binstructteacher", ("", "Qwen/Qwen3-8B"), "qwen3"),
        ("qwen7bhfteacher", ("", "Qwen/Qwen2.5-7B-Instruct"), "qwen2"),
    ],
)
def test_teacher_files_name_the_teacher_and_leave_the_student_alone(name, named, tmix):
    config = load(name)
    teacher = config.train.teacher
    assert ((teacher.path, teacher.hf_path), teacher.model.tmix) == (named, tmix)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("name", "tokens_per_step"),
    [
        ("paper_distill1", 32 * 512),
        ("paper_distill2", 96 * 512),
        ("paper_distill2a", 32 * 4096),
        ("paper_distill3", 96 * 16384),
        ("paper_distill3a", 96 * 16384),
        ("keep_align", 32 * 512),
        ("keep_distill", 96 * 512),
        ("keep_extend", 96 * 16384),
    ],
)
def test_the_papers_global_batches_on_one_device(name, tokens_per_step):
    config = load(name)
    assert config.train.micro_bsz * config.train.accumulate_grad_batches * config.model.ctx_len == tokens_per_step


@pytest.mark.parametrize("stage", PAPER_STAGES)
def test_a_paper_file_names_its_run_folder_by_its_own_stage(stage):
    assert load(f"paper_distill{stage}").train.proj_suffix == stage


def keep_recipe(stage, **keys):
    return load_config([CONFIGS / "rad_rwkv7.yaml", CONFIGS / f"keep_{stage}.yaml"], keys)


@pytest.mark.parametrize("stage", KEEP_STAGES)
def test_all_stages_that_keep_the_teacher_have_the_same_window_and_name_their_stage(stage):
    config = keep_recipe(stage)
    assert stage_of(config.train) == stage
    assert config.model.mixer == {"window_tokens": 64, "sink_tokens": 4}
    assert config.model == replace(keep_recipe("align").model, ctx_len=config.model.ctx_len)
    assert config.train.proj_suffix == f"keep{KEEP_STAGES.index(stage) + 1}"
    assert num_selected(keep_recipe(stage, **{"model.softmax_layers": "auto:3"}).model) == 3


def test_distilling_close_to_the_teacher_warms_up_for_a_tenth_and_decays_to_a_hundredth():
    train = keep_recipe("distill").train
    assert train.warmup_steps == pytest.approx(train.my_exit_tokens / (96 * 512) / 10, rel=0.01)
    assert (train.lr_final, train.lr2_final) == pytest.approx((train.lr_init / 100, train.lr2_init / 100))
    assert train.lr2_init < train.lr_init
    papers = [load(name).train.my_exit_tokens for name in ("paper_distill1", "paper_distill2")]
    thirds = [keep_recipe(stage).train.my_exit_tokens for stage in ("align", "distill")]
    assert [3 * tokens for tokens in thirds] == pytest.approx(papers, rel=0.02)


def test_released_and_paper_variants_of_rwkv7_differ():
    paper, released = (load(name).model for name in ("rad_rwkv7", "qwerky7"))
    assert (paper.balance_state, paper.groupnorm_att) == (1, 0)
    assert (released.balance_state, released.groupnorm_att) == (0, 1)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("groupnorm", {"groupnorm_att": 1, "balance_state": 0}),
        ("no_gate", {"gate_rank_type": 0}),
        ("no_tokenshift", {"use_tokenshift": 0}),
        ("reinit_att", {"reinit_att": 1}),
        ("use_rope", {"use_pos_emb": 1}),
    ],
)
def test_an_ablation_differs_from_its_base_in_its_switches_and_its_run_folder(what, changes):
    base, ablated = load("qwerky6"), load(f"qwerky6_ablation_{what}")
    before = vars(base.model)
    assert {key: value for key, value in vars(ablated.model).items() if value != before[key]} == changes
    student = SimpleNamespace(num_hidden_layers=28, hidden_size=3584)
    assert str(run_folder(ablated, student)) == f"out/L28-D3584-qwerky6_qwen2-{what}-0"


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
    assert sizes_in(load_config([tmp_path / "sizes.yaml"], {}).model) == sizes_in(load("qwen3-32b").model)


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
