"""Settings of mixers' own: keys that the schema leaves open, from files and the command line to a student."""

import pytest
import yaml

from radlads.config import Config, dump_config, load_config, parse_config
from radlads.config.schema import without_effect
from radlads.model.configuration import RadladsConfig


def parse(*argv):
    return parse_config(list(argv), write=pytest.fail)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("64", 64), ("0.5", 0.5), ("1e-3", 1e-3), ("true", True), ("false", False), ("soft", "soft")),
        *(("'64'", "64"), ("", ""), ("-1", -1)),
    ],
)
def test_a_value_is_what_yaml_reads(text, value):
    for config in (parse(f"--model.mixer.window={text}"), load_config([], {"model.mixer.window": text})):
        assert (type(config.model.mixer["window"]), config.model.mixer) == (type(value), {"window": value})


def test_files_merge_and_the_command_line_wins(tmp_path):
    for name, text in {"a": "{window: 1, kind: soft, rate: 1e-3}", "b": "{window: 2}"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"model: {{mixer: {text}}}")
    files = ["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")]
    assert parse(*files).model.mixer == {"window": 2, "kind": "soft", "rate": 1e-3}
    assert parse("--model.mixer.window:", "3", *files).model.mixer["window"] == 3


@pytest.mark.parametrize("value", [64, 1e-9, "soft", "64", "1", "true", "", True])
def test_what_is_dumped_is_loaded_equally(tmp_path, value):
    config = load_config([], {})
    config.model.mixer["a"] = config.train.teacher.model.mixer["b"] = value
    (tmp_path / "a.yaml").write_text(dump_config(config))
    loaded = load_config([tmp_path / "a.yaml"], {})
    assert (loaded, type(loaded.model.mixer["a"])) == (config, type(value))


def test_the_order_in_which_settings_are_given_changes_nothing():
    one, other = parse("--model.mixer.a=1", "--model.mixer.b=2"), parse("--model.mixer.b=2", "--model.mixer.a=1")
    assert dump_config(one) == dump_config(other)


def test_a_teachers_settings_have_no_effect():
    assert without_effect(parse("--train.teacher.model.mixer.window", "3")) == ["train.teacher.model.mixer"]
    assert without_effect(parse("--model.mixer.window", "3")) == []


NO_VALUE = "must be a finite number, text, or true or false, not"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.mixer.a=[1, 2]"], f"model.mixer.a on the command line {NO_VALUE} [1, 2]"),
        (["--model.mixer.a={b: 1}"], f"model.mixer.a on the command line {NO_VALUE} {{'b': 1}}"),
        (["--model.mixer.a=null"], f"model.mixer.a on the command line {NO_VALUE} None"),
        (["--model.mixer.a=.nan"], f"model.mixer.a on the command line {NO_VALUE} nan"),
        (["--train.teacher.model.mixer.a=[]"], f"train.teacher.model.mixer.a on the command line {NO_VALUE} []"),
        (
            ["--model.mixer.a=[1"],
            "model.mixer.a on the command line must be a value in YAML, not '[1': put text in quotes",
        ),
        (["--model.mixer.a"], "--model.mixer.a: expected one argument; --help lists every option"),
        (["--model.mixer=a"], "model.mixer on the command line is a group: set its keys, such as --model.mixer.KEY"),
        (["--model.mixer.a.b=1"], "unknown key 'model.mixer.a.b' on the command line: did you mean 'model.mixer'?"),
        (["--model.mixr.a=1"], "unknown key 'model.mixr.a' on the command line: did you mean 'model.mixer'?"),
    ],
)
def test_what_is_no_setting_is_refused(argv, message):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("rad_rwkv7", "model.mixer in {file} must be a mapping of keys to values, not 'rad_rwkv7'"),
        ("null", "model.mixer in {file} is empty: give it keys or delete it"),
        ("{1: 2}", "unknown key 'model.mixer.1' in {file}: did you mean 'model.mixer'?"),
        ("{a: {b: 1}}", f"model.mixer.a in {{file}} {NO_VALUE} {{{{'b': 1}}}}"),
    ],
)
def test_what_is_no_mapping_of_settings_is_refused(tmp_path, mixer, message):
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {{mixer: {mixer}}}")
    with pytest.raises(ValueError) as caught:
        load_config([file], {})
    assert str(caught.value) == message.format(file=file)


def test_a_printed_configuration_shows_them(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--model.mixer.window=64", "--print_config"], write=print)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["mixer"] == {"window": 64}
    assert printed["train"]["teacher"]["model"]["mixer"] == Config().model.mixer == {}


@pytest.mark.parametrize("stored", [3, {"rad_rwkv7": 4}, ["rad_rwkv7"]])
def test_stored_settings_that_are_no_mapping_are_one_sentence(stored):
    with pytest.raises(ValueError, match="mixer_settings must give each mixer's settings by the mixer's name"):
        RadladsConfig(num_hidden_layers=2, mixer_settings=stored)


def test_stored_settings_may_be_null():
    assert RadladsConfig(num_hidden_layers=2, mixer_settings=None).mixer_settings == {}
