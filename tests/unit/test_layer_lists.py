"""Which mixers each layer has, by every key that says so, from files and the command line."""

import pytest

from radlads.config import ModelConfig, dump_config, load_config, parse_config
from radlads.config.layer_lists import (
    mixer_names,
    mixers_by_layer,
    num_selected,
    selectable_layers,
    with_softmax_layers,
)

SHORT = {"rad_rwkv6": "6", "rad_rwkv7": "7", "qwen2": "s", "swiglu": "g", "own": "o"}


def spelt(model, num_layers=8):
    """Time and channel mixers, a letter a layer."""
    return " ".join("".join(SHORT[name] for name in names) for names in mixers_by_layer(model, num_layers))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "77777777"),
        ({"softmax_layers": "5"}, "77777s77"),
        ({"softmax_layers": "0, 3-5"}, "s77sss77"),
        ({"softmax_layers": "every:4"}, "777s777s"),
        ({"softmax_layers": "every:3"}, "77s77s77"),
        ({"softmax_layers": "every:1"}, "ssssssss"),
        ({"softmax_layers": "0,last:2"}, "s77777ss"),
        ({"layer_mixers": "0-3:rad_rwkv6,5:qwen2"}, "66667s77"),
        ({"layer_mixers": "1:rad_rwkv6, last:1:qwen2"}, "7677777s"),
        ({"layer_mixers": "every:2:rad_rwkv6"}, "76767676"),
        ({"inv_other_layer_ratio": 4}, "777777ss"),
        ({"tmix2": "rad_rwkv6", "inv_other_layer_ratio": 2}, "77776666"),
        ({"inv_other_layer_ratio": 3}, "777777ss"),
        ({"preserve_last_n_layers": 3}, "77777sss"),
        ({"softmax_layers": "auto:3", "preserve_last_n_layers": 1}, "7777777s"),
        ({"preserve_last_n_layers": 8}, "ssssssss"),
        # Later ones win
        ({"tmix2": "rad_rwkv6", "inv_other_layer_ratio": 2, "preserve_last_n_layers": 1}, "7777666s"),
        ({"preserve_last_n_layers": 2, "softmax_layers": "0", "layer_mixers": "0:rad_rwkv6,7:own"}, "677777so"),
    ],
)
def test_time_mixers(keys, expected):
    assert spelt(ModelConfig(**keys)).split()[0] == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "gggggggg"),
        ({"cmix": "own"}, "oooooooo"),
        ({"cmix2": "own", "inv_other_layer_ratio": 2}, "ggggoooo"),
        ({"cmix": "own", "inv_other_layer_ratio": 2}, "oooooooo"),
        ({"cmix": "own", "preserve_last_n_layers": 2}, "oooooogg"),
        ({"cmix": "own", "softmax_layers": "last:2", "layer_mixers": "0:qwen2"}, "oooooooo"),
    ],
)
def test_channel_mixers_follow_positions_alone(keys, expected):
    assert spelt(ModelConfig(**keys)).split()[1] == expected


def test_the_layers_that_are_selected_are_named_instead():
    model = ModelConfig(softmax_layers="auto:2", preserve_last_n_layers=1, layer_mixers="3:rad_rwkv6")
    assert num_selected(model) == 2
    assert selectable_layers(model, 8) == [0, 1, 2, 4, 5, 6]
    named = with_softmax_layers(model, [5, 1])
    assert (named.softmax_layers, num_selected(named)) == ("1,5", 0)
    assert spelt(named).split()[0] == "7s767s7s"


FORMS = "write layers as 5, 3-6, every:4 or last:4, with commas between them"
PAIRS = "write LAYERS:MIXER, as in 0-3:rad_rwkv6,every:4:qwen2"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"softmax_layers": "8"}, "model.softmax_layers names layer 8, but the layers are 0 to 7"),
        ({"softmax_layers": "6-9"}, "model.softmax_layers names layer 9, but the layers are 0 to 7"),
        ({"softmax_layers": "5,5"}, "model.softmax_layers names layer 5 twice: name each layer once"),
        ({"softmax_layers": "every:4,6-7"}, "model.softmax_layers names layer 7 twice: name each layer once"),
        ({"softmax_layers": "-1"}, f"model.softmax_layers has '-1': {FORMS}"),
        ({"softmax_layers": "5,"}, f"model.softmax_layers has '': {FORMS}"),
        (
            {"softmax_layers": "auto:8"},
            "model.softmax_layers is auto:8, but only 8 of the 8 layers can be selected, and one of them must stay "
            "recurrent: select fewer",
        ),
        (
            {"softmax_layers": "auto:6", "preserve_last_n_layers": 1, "layer_mixers": "0-1:rad_rwkv6"},
            "model.softmax_layers is auto:6, but only 5 of the 8 layers can be selected, and one of them must stay "
            "recurrent: select fewer",
        ),
        (
            {"softmax_layers": "auto:0"},
            "model.softmax_layers is auto:0: give the number of layers to select, 1 or more",
        ),
        (
            {"softmax_layers": "5,auto:1"},
            "model.softmax_layers has 'auto:1': it stands alone, without other layers, in model.softmax_layers",
        ),
        (
            {"softmax_layers": "auto:x"},
            "model.softmax_layers has 'auto:x': write auto:2 for two layers that are found after stage 1",
        ),
        ({"softmax_layers": "all"}, f"model.softmax_layers has 'all': {FORMS}"),
        ({"softmax_layers": "6-3"}, f"model.softmax_layers has '6-3', which ends before it begins: {FORMS}"),
        (
            {"softmax_layers": "every:0"},
            "model.softmax_layers has 'every:0', but the number must be from 1 to 8, the layers there are",
        ),
        (
            {"softmax_layers": "last:9"},
            "model.softmax_layers has 'last:9', but the number must be from 1 to 8, the layers there are",
        ),
        ({"layer_mixers": "9:qwen2"}, "model.layer_mixers names layer 9, but the layers are 0 to 7"),
        ({"layer_mixers": "0-3:qwen2,3:own"}, "model.layer_mixers names layer 3 twice: name each layer once"),
        ({"layer_mixers": "5"}, f"model.layer_mixers has '5': {PAIRS}"),
        ({"layer_mixers": "5:"}, f"model.layer_mixers has '5:': {PAIRS}"),
        ({"layer_mixers": "every:4"}, f"model.layer_mixers has 'every:4': {PAIRS}"),
        ({"preserve_last_n_layers": 9}, "model.preserve_last_n_layers is 9, but there are 8 layers"),
    ],
)
def test_lists_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValueError) as caught:
        mixers_by_layer(ModelConfig(**keys), 8)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("softmax_layers: 5", "77777s77"),
        ("softmax_layers: [0, 5]", "s7777s77"),
        ("softmax_layers: ['every:4', 0]", "s77s777s"),
        ("softmax_layers: 3-6", "777ssss7"),
        ("layer_mixers: {0-3: rad_rwkv6, 5: qwen2}", "66667s77"),
        ("layer_mixers: {'0,7': rad_rwkv6}", "67777776"),
        ("layer_mixers: 0:qwen2", "s7777777"),
        ("layer_mixers: {}", "77777777"),
    ],
)
def test_files_may_hold_lists_and_mappings(tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(f"model: {{{text}}}")
    config = load_config([tmp_path / "a.yaml"], {})
    assert spelt(config.model).split()[0] == expected
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "b.yaml"], {}) == config


@pytest.mark.parametrize("text", ["softmax_layers: [1.5]", "softmax_layers: [true]", "layer_mixers: {0: 5}"])
def test_files_that_hold_something_else_are_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"model: {{{text}}}")
    with pytest.raises(ValueError, match=rf"^model\.{text.partition(':')[0]} in .*a\.yaml must be text"):
        load_config([tmp_path / "a.yaml"], {})


def test_the_command_line():
    words = ["--model.softmax_layers", "every:4", "--model.layer_mixers", "0-1:rad_rwkv6,2:own"]
    model = parse_config(words, write=pytest.fail).model
    assert spelt(model).split()[0] == "66os777s"
    assert mixer_names(model) == {"rad_rwkv7", "rad_rwkv6", "own"}
