"""Files and overrides to a checked configuration, and what users get wrong."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import radlads
from radlads.config import Config, ModelConfig, TeacherConfig, TrainConfig, dump_config, load_config, parse_config
from radlads.config import stage_of as stage
from radlads.config.schema import checkpointing_of


def parse(*argv: str) -> Config:
    return parse_config(list(argv), write=pytest.fail)


@pytest.fixture
def write_file(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def error_of(*argv):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_default():
    assert parse() == Config() == load_config([], {})


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta2", 0.99), ("lr_init", 6e-4), ("micro_bsz", 12), ("load_model", ""), ("precision", "bf16")],
)
def test_train_defaults_are_those_of_the_released_system(key, value):
    assert getattr(TrainConfig(), key) == value


def test_the_teacher_is_softmax_by_default():
    assert TrainConfig().teacher.model.tmix == "qwen2"


def test_later_files_win_and_merge(write_file):
    first = write_file("model: {n_layer: 3, n_embd: 8}\ntrain: {lr_init: 1}")
    second = write_file("model: {n_layer: 4}", "b.yaml")
    config = parse("-c", first, "--config", second)
    assert (config.model.n_layer, config.model.n_embd, config.train.lr_init) == (4, 8, 1.0)


@pytest.mark.parametrize("option", ["-c", "--config"])
def test_options_win_over_files_wherever_they_stand(write_file, option):
    file = write_file("model: {n_layer: 3, n_embd: 8}")
    config = parse("--model.n_layer", "12", option, file, "--model.n_embd=16")
    assert (config.model.n_layer, config.model.n_embd) == (12, 16)


@pytest.mark.parametrize("argv", [["--train.lr_init:", "6e-3"], ["--train.lr_init:=6e-3"], ["--train.lr_init=6e-3"]])
def test_a_trailing_colon_is_tolerated(argv):
    assert parse(*argv).train.lr_init == 6e-3


def test_a_value_may_be_negative_or_empty():
    config = parse("--train.lr2_init", "-1", "--train.proj_suffix=", "--train.devices=-1")
    assert (config.train.lr2_init, config.train.proj_suffix, config.train.devices) == (-1.0, "", -1)


def test_nested_teacher_keys():
    config = parse("--train.teacher.model.rope.base", "1e6", "--train.teacher.path=t")
    assert config.train.teacher == TeacherConfig(
        path="t",
        model=dataclasses.replace(
            TeacherConfig().model, rope=dataclasses.replace(TeacherConfig().model.rope, base=1e6)
        ),
    )


def test_overrides_of_load_config_win(write_file):
    config = load_config([write_file("train: {lr_init: 1}")], {"train.lr_init": 2, "train.grad_cp": True})
    assert (config.train.lr_init, config.train.grad_cp) == (2.0, 1)


def test_json_with_tabs(write_file):
    assert parse("-c", write_file('{\n\t"model": {"n_layer":\t9}\n}', "a.json")).model.n_layer == 9


def test_dotted_keys_in_a_file(write_file):
    assert parse("-c", write_file("model.n_layer: 9")).model.n_layer == 9


def test_types_of_the_released_files_are_dropped_at_every_depth(write_file):
    text = "__type__: A\nmodel: {__type__: B, rope: {__type__: C, base: 5}}\ntrain: {teacher: {model: {__type__: D}}}"
    assert parse("-c", write_file(text)) == parse("--model.rope.base=5")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.e-3", "1.0e-3"])
def test_floats_with_and_without_a_dot(write_file, text):
    assert parse("-c", write_file(f"train: {{lr_init: {text}}}")).train.lr_init == 0.001
    assert parse("--train.lr_init", text).train.lr_init == 0.001


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1", 1), ("true", 1), ("false", 0), ("True", 1)])
def test_switches_take_numbers_and_truth_values(write_file, text, value):
    from_file = parse("-c", write_file(f"train: {{grad_cp: {text}}}")).train.grad_cp
    from_line = parse("--train.grad_cp", text).train.grad_cp
    assert [(type(got), got) for got in (from_file, from_line)] == [(int, value)] * 2


@pytest.mark.parametrize("name", ["use_tokenshift", "balance_state", "groupnorm_att", "use_pos_emb", "reinit_att"])
def test_every_model_switch_takes_true(name):
    assert getattr(parse(f"--model.{name}=true").model, name) == 1


def test_whole_numbers_are_text_where_text_is_wanted(write_file):
    train = parse("-c", write_file("train: {proj_suffix: 2, precision: 32}")).train
    assert (train.proj_suffix, train.precision) == ("2", "32")


@pytest.mark.parametrize("precision", ["auto", "bf16", "bf16-mixed", "bf16-true", "fp32", "32"])
def test_precisions(precision):
    assert parse("--train.precision", precision).train.precision == precision


def test_null_where_it_is_allowed(write_file):
    assert parse("-c", write_file("train: {val_check_interval: null}")).train.val_check_interval is None


BAD_FILES = {
    "": "config file {file} is empty: give it keys or leave it out",
    "- 1": "config file {file} must hold a mapping of keys to values, not list",
    "model: null": "model in {file} is empty: give it keys or delete it",
    "train:\n  teacher:\n": "train.teacher in {file} is empty: give it keys or delete it",
    "model: 5": "model in {file} must be a mapping of keys to values, not 5",
    "train: {lr_int: 1}": "unknown key 'train.lr_int' in {file}: did you mean 'train.lr_init'?",
    "trian: {lr_init: 1}": "unknown key 'trian' in {file}: did you mean 'train'?",
    "lr_init: 1": "unknown key 'lr_init' in {file}: did you mean 'train.lr_init'?",
    "zzz: 1": "unknown key 'zzz' in {file}: --help lists every key",
    "1: 1": "unknown key '1' in {file}: --help lists every key",
    "train: {micro_bsz: twelve}": "train.micro_bsz in {file} must be an integer, not 'twelve'",
    "train: {micro_bsz: 1.5}": "train.micro_bsz in {file} must be an integer, not 1.5",
    "train: {micro_bsz: true}": "train.micro_bsz in {file} must be an integer, not True",
    "train: {micro_bsz: null}": "train.micro_bsz in {file} must be an integer, not null",
    "train: {lr_init: {a: 1}}": "train.lr_init in {file} must be a number, not {{'a': 1}}",
    "train: {lr_init: .nan}": "train.lr_init in {file} must be greater than 0, not nan",
    "train: {val_check_interval: a}": "train.val_check_interval in {file} must be a number or null, not 'a'",
    "train: {wandb: off}": "train.wandb in {file} must be text (in quotes where YAML reads it otherwise), not False",
    "train: {magic_prime: 2.5}": "train.magic_prime in {file} must be an integer or one of 'auto', not 2.5",
    "train: {grad_cp: 2}": "train.grad_cp in {file} must be one of 0, 1, not 2",
    "train: {trainable: some}": (
        "train.trainable in {file} must be one of 'auto', 'mixer', 'decay', 'all', 'no_softmax', not 'some'"
    ),
    "train:\n  lr_init: 1\n  lr_init: 2": "cannot read {file} line 3: key 'lr_init' is given twice; correct it there",
    "model: {n_layer: 1": "cannot read {file} line 1: expected ',' or '}}', but got '<stream end>'; correct it there",
    "a: 1\n\tb: 2": "cannot read {file} line 2: found character '\\t' that cannot start any token; correct it there",
    "[a]: 1": "cannot read {file} line 1: found unhashable key; correct it there",
    "a: 2026-13-45": "cannot read {file}: month must be in 1..12; correct it there",
    "\x07": "cannot read {file}: unacceptable character #x0007: special characters are not allowed; correct it there",
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.items())
def test_bad_files(write_file, text, message):
    file = write_file(text)
    assert error_of("-c", file) == message.format(file=file)


def test_a_duplicate_key_in_json(write_file):
    file = write_file('{"model": {},\n "model": {}}', "a.json")
    assert error_of("-c", file) == f"cannot read {file} line 2: key 'model' is given twice; correct it there"


def test_a_missing_file(tmp_path):
    file = tmp_path / "none.yaml"
    assert error_of("-c", str(file)) == f"config file {file} does not exist: check the path after -c"


def test_a_folder_is_no_file(tmp_path):
    assert error_of("-c", str(tmp_path)) == f"config {tmp_path} is a folder: name one of the files in it"


def test_a_file_of_bytes(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"a: \xff")
    assert error_of("-c", str(file)) == f"config file {file} is not UTF-8 text: save it as such"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr_int=1"], "unknown key 'train.lr_int' on the command line: did you mean 'train.lr_init'?"),
        (["--train.lr_int", "1"], "unknown key 'train.lr_int' on the command line: did you mean 'train.lr_init'?"),
        (["--train.micro_bsz=x"], "train.micro_bsz on the command line must be an integer, not 'x'"),
        (["--train.micro_bsz=null"], "train.micro_bsz on the command line must be an integer, not 'null'"),
        (["--train.micro_bsz=-1"], "train.micro_bsz on the command line must be 1 or more, not -1"),
        (["--train.micro_bsz"], "--train.micro_bsz: expected one argument; --help lists every option"),
        (["--model=a.yaml"], "model on the command line is a group: set its keys, such as --model.hf_path"),
        (["a"], "unexpected 'a' on the command line: files are given as -c FILE and keys as --train.lr_init 6e-4"),
        (["-c"], "-c/--config: expected one argument; --help lists every option"),
    ],
)
def test_bad_command_lines(argv, message):
    assert error_of(*argv) == message


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("train.lr_init", 0, "greater than 0"),
        ("train.lr_final", -1, "greater than 0"),
        ("train.lr2_init", -2, "greater than 0, or -1 to follow the other rate"),
        ("train.lr_wait", 1.1, "between 0 and 1"),
        ("train.lr_endpoint", -0.1, "between 0 and 1"),
        ("train.beta1", 1, "at least 0 and below 1"),
        ("train.beta2", -0.1, "at least 0 and below 1"),
        ("train.adam_eps", 0, "greater than 0"),
        ("train.weight_decay", -1, "0 or more"),
        ("train.warmup_steps", -2, "0 or more, or -1 for unset"),
        ("train.devices", 0, "1 or more, or -1 for all"),
        ("train.my_exit_tokens", -1, "0 or more"),
        ("train.heldout_tokens", 0, "1 or more"),
        ("train.attention_distillation_stage", 3, "1 to align, 2 to distill, -1 to extend or 4 to instruct"),
        ("train.optimizer", "sgd", "one of 'adamw', 'muon', 'dsfusedadamw', 'adamwschedulefree', 'adam8bit', 'lion'"),
        ("train.lr_decay_type", "step", "one of 'cos', 'linear', 'exp', 'oneminussqrt'"),
        ("train.teacher.kl_weight", -1, "0 or more"),
        ("train.teacher.ce_weight", -1, "0 or more"),
        ("train.teacher.model.n_layer", 0, "1 or more"),
        ("model.n_layer", 0, "1 or more"),
        ("model.dropout", 1, "at least 0 and below 1"),
        ("model.rope.base", 0, "greater than 0"),
        ("model.inv_other_layer_ratio", 0.5, "1 or more"),
        ("model.lora_rank_decay", -1, "0 or more"),
        ("model.gate_rank_type", 3, "one of 0, 1, 2"),
    ],
)
def test_values_out_of_range(key, value, expectation):
    with pytest.raises(ValueError, match=rf"^{key} in the overrides must be ") as caught:
        load_config([], {key: value})
    assert expectation in str(caught.value)


def test_the_decay_begins_before_it_ends():
    with pytest.raises(ValueError, match=r"^train.lr_wait must be at most train.lr_endpoint, which is 0.2, not 0.5$"):
        TrainConfig(lr_wait=0.5, lr_endpoint=0.2)


def test_a_teacher_without_any_loss():
    with pytest.raises(ValueError, match=r"kl_weight and train.teacher.ce_weight are both 0"):
        TeacherConfig(kl_weight=0, ce_weight=0)


def test_choices_are_checked_in_python_too():
    with pytest.raises(ValueError, match=r"train.align_loss must be one of 'l2', 'mse', not 'l1'"):
        TrainConfig(align_loss="l1")


@pytest.mark.parametrize(("number", "name"), [(1, "align"), (2, "distill"), (-1, "extend")])
def test_stages(number, name):
    assert stage(TrainConfig(attention_distillation_stage=number)) == name


@pytest.mark.parametrize("suffix", ["1e-3", "1.0e-3", "0", "null", "yes", "", "a: b", "é\n#", "2026-01-01", "1_0"])
def test_dump_loads_back_to_an_equal_config(write_file, suffix):
    config = Config(
        model=ModelConfig(n_layer=3, rms_norm_eps=1e-5, use_tokenshift=0),
        train=TrainConfig(proj_suffix=suffix, val_check_interval=0.5, lr_init=1e-10, teacher=TeacherConfig(path="t")),
    )
    assert load_config([write_file(dump_config(config))], {}) == config


def test_print_config_writes_what_loads_back(write_file):
    written = []
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--model.n_layer=7", "--print_config"], written.append)
    assert stopped.value.code == 0
    assert load_config([write_file("".join(written))], {}) == parse("--model.n_layer=7")


def test_help_names_every_key_with_its_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    written = []
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"], written.append)
    (text,) = written
    assert stopped.value.code == 0
    assert "--train.my_exit_tokens" in text
    assert "The stage's token budget; 0 = one pass of the data." in text
    assert "--model CONFIG" not in text


def test_every_key_has_help():
    written = []
    with pytest.raises(SystemExit):
        parse_config(["--help"], written.append)
    assert "(type: " in written[0]
    assert not re.findall(r"--\S+ \S+\s+\(type", written[0])


def test_configuration_does_not_import_torch():
    code = "import sys, radlads.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(radlads.__file__).parents[1], check=True)


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({}, "none"),
        ({"grad_cp": 1}, "full"),
        ({"activation_checkpointing": "selective"}, "selective"),
        ({"grad_cp": 1, "activation_checkpointing": "full"}, "full"),
        ({"grad_cp": 1, "attention_distillation_stage": 1}, "none"),
    ],
)
def test_the_released_name_of_checkpointing_means_full(keys, meant):
    assert checkpointing_of(TrainConfig(**keys)) == meant


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_contradicting_checkpointing_keys_are_refused(mode):
    with pytest.raises(ValueError, match=r"train\.grad_cp 1 means full .* set grad_cp to 0"):
        TrainConfig(grad_cp=1, activation_checkpointing=mode)
