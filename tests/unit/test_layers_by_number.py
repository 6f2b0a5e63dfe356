"""Students whose layers are chosen one by one: setup, two stages, later stages' checks, a mix of two recurrences."""

import json
import re
import sys

import pytest
import tiny
import torch

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.published_export import convert_to_published
from radlads.cli import main
from radlads.config.load import load_config, parse_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher, layer_mixers
from radlads.distill.stage import is_trainable
from radlads.model import registry
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import build_time_mixer
from radlads.recipes.llama_cpp import check_runs
from radlads.recipes.single_stage import check_student, train_stage
from radlads.recipes.stage_configs import Conversion, stage_configs
from radlads.train.optimizers.optim import build_optimizers

MIXED = "0:rad_rwkv6,1:qwen2"
WINDOW = '''
from dataclasses import dataclass

from radlads.model.rad_rwkv6 import RadRwkv6


@dataclass(frozen=True, slots=True)
class Settings:
    window: int = 64
    """Tokens that the softmax part sees,
    the newest included."""
    rate: float = 0.5

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be 1 or more, not {self.window}")


class TMix_windowed(RadRwkv6):
    """As RAD-RWKV6, for tests."""

    Settings = Settings
'''


def command_line(folder, stage, **overrides):
    """As stage_config, but from words, with two steps and the every:2 of a user."""
    keys = {"model.ctx_len": 16, "model.groupnorm_att": 0, "model.gate_rank_type": 2, "train.micro_bsz": 4}
    keys |= {"train.attention_distillation_stage": {"align": 1, "distill": 2}[stage], "train.precision": "fp32"}
    keys |= {"train.accelerator": "cpu", "train.my_exit_tokens": 16 * 4 * 2, "train.data_file": folder / "train"}
    words = [word for key, value in (keys | overrides).items() for word in (f"--{key}", str(value))]
    return parse_config([*words, "--model.softmax_layers", "every:2"], write=pytest.fail)


def test_two_stages_with_softmax_layers(teacher, corpus_folder, tmp_path):
    keys = {"train.teacher.hf_path": teacher, "train.proj_dir": tmp_path}
    first = train_stage(command_line(corpus_folder, "align", **keys), tiny.Silent()).folder
    second = command_line(corpus_folder, "distill", **keys, **{"train.load_model": first, "train.proj_suffix": 2})
    student = load_model(train_stage(second, tiny.Silent()).folder)
    assert student.config.time_mixers == ["rad_rwkv7", "qwen2", "rad_rwkv7"]
    assert student.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]


def test_layers_that_are_kept_are_the_teachers_after_setup(teacher):
    source = open_teacher(teacher)
    student, _ = build_student(source, load_config([], {"model.softmax_layers": "every:2"}).model)
    kept = {name: x for name, x in student.named_parameters() if name.startswith("model.layers.1.")}
    assert len(kept) == 12
    assert all(torch.equal(parameter, source.weights[name]) for name, parameter in kept.items())


@pytest.mark.parametrize("keys", [{"softmax_layers": "every:1"}, {"layer_mixers": "0-2:qwen2"}])
def test_a_student_that_keeps_all_layers_has_the_teachers_logits(teacher, keys):
    source = open_teacher(teacher)
    model = load_config([], {f"model.{key}": value for key, value in keys.items()}).model
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = build_teacher(source)(tokens).logits
    torch.testing.assert_close(build_student(source, model)[0](tokens).logits, expected, atol=1e-5, rtol=0)


def test_aligning_a_student_that_keeps_all_layers_is_refused(teacher, corpus_folder, tmp_path):
    keys = {"train.teacher.hf_path": str(teacher), "train.proj_dir": str(tmp_path), "model.softmax_layers": "0-2"}
    with pytest.raises(ValueError, match=r"leave no layer with a mixer to align: name fewer layers$"):
        train_stage(tiny.stage_config(corpus_folder, "align", **keys), tiny.Silent())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.softmax_layers=4", "model.softmax_layers names layer 4, but the layers are 0 to 3"),
        ("model.softmax_layers=auto:4", "model.softmax_layers is auto:4, but only 4 of the 4 layers can be selected"),
        ("model.softmax_layers=every:1", "leave no mixer to align: name fewer layers"),
        ("model.mixer.windw=3", "windw is not a setting of rad_rwkv7: choose one of sink_tokens, window_tokens"),
        ("model.mixer.window_tokens=-3", "model.mixer.window_tokens must be 0 or more, not -3"),
        ("model.mixer.sink_tokens=3", "model.mixer.sink_tokens is 3, but there is no window that could see them"),
    ],
)
def test_a_conversion_is_refused_before_anything_is_written(tmp_path, capsys, override, message):
    recipe = "paper" if "sink_tokens" in override else "window"
    assert main(["demo", "--recipe", recipe, "--out", str(tmp_path / "out"), "--set", override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_stages_of_a_conversion_have_its_layers(tmp_path):
    overrides = {"model.softmax_layers": "every:2", "model.layer_mixers": "0:rad_rwkv6", "train.accelerator": "cpu"}
    configs = stage_configs(Conversion(out=tmp_path, overrides=overrides))
    assert {tuple(layer_mixers(each.model, 4)) for each in configs.values()} == {
        ("rad_rwkv6", "qwen2", "rad_rwkv7", "qwen2")
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:1", "has qwen2 in layer 1, but the configuration names rad_rwkv7 there: give the layers of the model"),
        (
            "",
            "keeps softmax in layers 1, where the configuration names another mixer: give model.softmax_layers as the",
        ),
    ],
)
def test_a_later_stage_with_other_layers_is_refused(tmp_path, layers, message):
    student = RadladsConfig(**tiny.SIZES, time_mixers=["rad_rwkv7", "qwen2", "rad_rwkv7"])
    config = tiny.stage_config(tmp_path, "distill", **{"model.softmax_layers": layers, "train.load_model": "out/1"})
    with pytest.raises(ValueError, match=f"^out/1 {re.escape(message)}"):
        check_student(config, student, None)


# A mixer with settings of its own


@pytest.fixture
def windowed(tmp_path, monkeypatch):
    """A folder for --mixer-path that holds the mixer WINDOW."""
    (tmp_path / "tmix").mkdir()
    (tmp_path / "tmix" / "tmix_windowed.py").write_text(WINDOW)
    monkeypatch.setattr(registry, "_mixer_paths", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    registry.add_mixer_path(tmp_path)
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "tmix"]:
        del sys.modules[module]


def with_settings(folder, stage="distill", **settings):
    keys = {"model.layer_mixers": "1:windowed", **{f"model.mixer.{key}": value for key, value in settings.items()}}
    return tiny.stage_config(folder, stage, **keys)


def test_a_student_holds_its_mixers_settings_with_their_defaults(teacher, windowed):
    student, _ = build_student(open_teacher(teacher), with_settings(windowed, window=32).model)
    save_model(student, windowed / "model")
    stored = json.loads((windowed / "model" / "config.json").read_text())
    assert stored["mixer_settings"] == {"windowed": {"window": 32, "rate": 0.5}}
    settings = student.config.settings_of(1)
    assert (settings.window, settings.rate) == (32, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "soft"}, "model.mixer.window must be a whole number, not 'soft'"),
        ({"window": 0}, "model.mixer.window must be 1 or more, not 0"),
        (
            {"windw": 3},
            "model.mixer.windw is not a setting of rad_rwkv7, windowed: "
            "choose one of rate, sink_tokens, window, window_tokens",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_settings_that_no_mixer_has_are_refused_before_any_work(teacher, windowed, settings, message, stage):
    config = with_settings(windowed, stage, **settings)
    with pytest.raises(ValueError) as caught:
        if stage == "align":
            build_student(open_teacher(teacher), config.model)
        else:
            check_student(config, stored_student(), None)
    assert str(caught.value) == message


def stored_student():
    mixers, settings = ["rad_rwkv7", "windowed", "rad_rwkv7"], {"windowed": {"window": 32, "rate": 1.0}}
    return RadladsConfig(**tiny.SIZES, time_mixers=mixers, mixer_settings=settings)


@pytest.mark.parametrize("settings", [{}, {"window": 32}, {"rate": 1}])
def test_a_later_stage_may_leave_settings_out(windowed, settings):
    check_student(with_settings(windowed, **settings), stored_student(), None)


def test_a_later_stage_with_another_setting_is_refused(windowed):
    with pytest.raises(ValueError) as caught:
        check_student(with_settings(windowed, window=64), stored_student(), None)
    expected = "model.mixer.window is 64, but windowed in the model has 32: give the value of that very model, or none"
    assert str(caught.value) == expected


# RAD-RWKV6 and RAD-RWKV7 in one stack


@pytest.fixture(scope="module")
def mixed(teacher):
    """RAD-RWKV6, softmax attention, RAD-RWKV7, as setup leaves them."""
    torch.manual_seed(3)
    keys = {"model.layer_mixers": MIXED, "model.groupnorm_att": 0, "model.gate_rank_type": 1}
    return build_student(open_teacher(teacher), load_config([], keys).model)[0]


def test_fresh_values_of_a_mix_are_those_of_each_mixer(mixed):
    assert mixed.config.time_mixers == ["rad_rwkv6", "qwen2", "rad_rwkv7"]
    assert mixed.config.first_value_layer == 2
    torch.manual_seed(3)
    for layer in mixed.config.recurrent_layers:
        direct = dict(build_time_mixer(mixed.config, layer).named_parameters())
        for name, parameter in mixed.model.layers[layer].self_attn.named_parameters():
            assert torch.equal(parameter, direct[name]) or "_proj" in name, name


def test_decay_of_a_mix_is_each_mixers_own(mixed):
    names = [name for name, _ in mixed.named_parameters() if is_trainable(name, mixed, "decay")]
    assert {name.split(".")[2] for name in names} == {"0", "2"}
    assert "model.layers.0.self_attn.time_decay" in names and "model.layers.2.self_attn.w0" in names


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_mix_trains(teacher, corpus_folder, tmp_path, mixed, stage):
    save_model(mixed, tmp_path / "setup")
    keys = {"model.layer_mixers": MIXED, "model.gate_rank_type": 1, "train.load_model": str(tmp_path / "setup")}
    keys |= {"train.teacher.hf_path": str(teacher), "train.proj_dir": str(tmp_path)}
    trained = load_model(train_stage(tiny.stage_config(corpus_folder, stage, **keys), tiny.Silent()).folder)
    before, after = dict(mixed.named_parameters()), dict(trained.named_parameters())
    for name in ("0.self_attn.time_decay_w2", "2.self_attn.w0", "0.self_attn.q_proj.weight"):
        assert not torch.equal(before[f"model.layers.{name}"], after[f"model.layers.{name}"]), name


def test_muon_takes_a_mix(mixed, tmp_path):
    optimizers = build_optimizers(mixed, tiny.stage_config(tmp_path, "distill", **{"train.optimizer": "muon"}).train)
    held = sum(len(group["params"]) for each in optimizers for group in each.param_groups)
    assert held == len(list(mixed.parameters()))


@pytest.mark.parametrize("mixers", [["rad_rwkv6", "rad_rwkv7", "rad_rwkv7"], ["rad_rwkv7", "rad_rwkv6", "qwen2"]])
def test_a_mix_generates_what_its_forward_pass_says(mixers):
    torch.manual_seed(0)
    model = RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=mixers)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    prompt = torch.randint(1, 97, (2, 7))
    cached, plain = (model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def test_the_published_format_refuses_a_mix(mixed, teacher, tmp_path):
    save_model(mixed, tmp_path / "model")
    expected = (
        "holds stacks of rad_rwkv6 or of rad_rwkv7, not of rad_rwkv6 and rad_rwkv7: export the model with its code"
    )
    with pytest.raises(ValueError, match=expected):
        convert_to_published(tmp_path / "model", tmp_path / "out", tokenizer_folder=teacher)
    assert not (tmp_path / "out").exists()


def test_llama_cpp_refuses_a_mix(mixed):
    with pytest.raises(
        ValueError, match=r"^llama\.cpp cannot run this model: it has no softmax layers beside .*RAD-RWKV7"
    ):
        check_runs(mixed.config)
