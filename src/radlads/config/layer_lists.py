"""Which mixers each layer has, by the keys of a model section. The only place that reads these keys.

Leaves out what a name stands for: this knows no mixer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from radlads.config.schema import GATED_MLP, SOFTMAX_MIXER, ModelConfig

_SOFTMAX_LAYERS, _LAYER_MIXERS = "model.softmax_layers", "model.layer_mixers"
_FORMS = "write layers as 5, 3-6, every:4 or last:4, with commas between them"
_AUTO = re.compile(r"\s*auto:(\d+)\s*")


class LayerMixers(NamedTuple):
    """The names of the time mixer and the channel mixer of each layer, as the configuration spells them."""

    time: list[str]
    channel: list[str]


def mixers_by_layer(model: ModelConfig, num_layers: int) -> LayerMixers:
    """The mixers of each of `num_layers` layers.

    In this order, of which the later win: tmix and cmix; tmix2 and cmix2 in the last n / inv_other_layer_ratio layers;
    softmax attention and the gated MLP in the last preserve_last_n_layers; softmax_layers; layer_mixers. The last two
    leave channel mixers as they are. softmax_layers auto:K names no layer until K of them are selected
    (with_softmax_layers). Raises ValueError for a layer that does not exist or is named twice in one list, for a list
    that cannot be read, if more layers are to be preserved than there are, and for a K that leaves no layer.
    """
    time, channel = _by_position(model, num_layers)
    if num_selected(model):
        _check_selected(model, num_layers)
    else:
        for layer in layers_of(model.softmax_layers, num_layers, _SOFTMAX_LAYERS):
            time[layer] = SOFTMAX_MIXER
    for layer, name in _named_layers(model.layer_mixers, num_layers).items():
        time[layer] = name
    return LayerMixers(time, channel)


def num_selected(model: ModelConfig) -> int:
    """K of softmax_layers auto:K, the number of layers to select after stage 1; 0 if the layers are named.

    Raises ValueError for auto:0.
    """
    match = _AUTO.fullmatch(model.softmax_layers)
    if match is None:
        return 0
    if int(match[1]) == 0:
        raise ValueError(f"{_SOFTMAX_LAYERS} is auto:0: give the number of layers to select, 1 or more")
    return int(match[1])


def with_softmax_layers(model: ModelConfig, layers: Iterable[int]) -> ModelConfig:
    """The section with these layers, and no others, as its softmax_layers."""
    return replace(model, softmax_layers=",".join(map(str, sorted(layers))))


def selectable_layers(model: ModelConfig, num_layers: int) -> list[int]:
    """The layers that auto:K chooses from: those that softmax_layers would turn into softmax attention."""
    every = with_softmax_layers(model, range(num_layers))
    before, after = (mixers_by_layer(each, num_layers).time for each in (with_softmax_layers(model, ()), every))
    return [layer for layer in range(num_layers) if before[layer] != after[layer]]


def uniform_layers(layers: Sequence[int], number: int) -> tuple[int, ...]:
    """So many of the layers at equal distances, the last one among them: of 8, two are 3 and 7, as every:4 names."""
    return tuple(layers[(i + 1) * len(layers) // number - 1] for i in range(number))


def _check_selected(model: ModelConfig, num_layers: int) -> None:
    """Raise ValueError if auto:K asks for more layers than may be turned, or leaves no other."""
    wanted, there = num_selected(model), len(selectable_layers(model, num_layers))
    if wanted >= there:
        raise ValueError(
            f"{_SOFTMAX_LAYERS} is auto:{wanted}, but only {there} of the {num_layers} layers can be selected, and one "
            "of them must stay recurrent: select fewer"
        )


def mixer_names(model: ModelConfig) -> set[str]:
    """Every name of a time mixer or channel mixer that the section gives."""
    named = {item.rpartition(":")[2].strip() for item in _items(model.layer_mixers)}
    return ({model.tmix, model.tmix2, model.cmix, model.cmix2} | named) - {""}


def layers_of(text: str, num_layers: int, key: str) -> list[int]:
    """The layers that a list such as 5,8-11,every:4 names, in its order. key: what the list is called in errors.

    Raises ValueError as mixers_by_layer.
    """
    layers: list[int] = []
    for item in _items(text):
        for layer in _layers_of_item(item, num_layers, key):
            if layer in layers:
                raise ValueError(f"{key} names layer {layer} twice: name each layer once")
            layers.append(layer)
    return layers


def as_text(value: object) -> object:
    """A list of layers, or a mapping of layers to mixers, as one text; anything else as it is."""
    if isinstance(value, list) and all(type(item) in (int, str) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, Mapping) and all(type(name) is str for name in value.values()):
        pairs = ((item, name) for layers, name in value.items() for item in _items(str(layers)))
        return ",".join(f"{item}:{name}" for item, name in pairs)
    return value


def _by_position(model: ModelConfig, num_layers: int) -> tuple[list[str], list[str]]:
    """Time and channel mixers by tmix, cmix, tmix2, cmix2, inv_other_layer_ratio and preserve_last_n_layers."""
    ratio, preserved = model.inv_other_layer_ratio, model.preserve_last_n_layers
    if preserved > num_layers:
        raise ValueError(f"model.preserve_last_n_layers is {preserved}, but there are {num_layers} layers")
    first = model.tmix, model.cmix or GATED_MLP
    second = model.tmix2 or SOFTMAX_MIXER, model.cmix2 or model.cmix or GATED_MLP
    switch = num_layers * (ratio - 1) / ratio if ratio > 1 else num_layers
    pairs = [second if layer >= switch else first for layer in range(num_layers)]
    pairs[num_layers - preserved :] = [(SOFTMAX_MIXER, GATED_MLP)] * preserved
    return [time for time, _ in pairs], [channel for _, channel in pairs]


def _named_layers(text: str, num_layers: int) -> dict[int, str]:
    """The mixers that layer_mixers gives single layers."""
    named: dict[int, str] = {}
    for item in _items(text):
        layers, _, name = (part.strip() for part in item.rpartition(":"))
        if not layers or not name or layers in ("every", "last"):
            raise ValueError(f"{_LAYER_MIXERS} has {item!r}: write LAYERS:MIXER, as in 0-3:rad_rwkv6,every:4:qwen2")
        for layer in layers_of(layers, num_layers, _LAYER_MIXERS):
            if layer in named:
                raise ValueError(f"{_LAYER_MIXERS} names layer {layer} twice: name each layer once")
            named[layer] = name
    return named


def _layers_of_item(item: str, num_layers: int, key: str) -> range:
    if match := re.fullmatch(r"(every|last):(\d+)", item):
        return _counted(match[1], int(match[2]), num_layers, key)
    if item.partition(":")[0] == "auto" and not _AUTO.fullmatch(item):
        raise ValueError(f"{key} has {item!r}: write auto:2 for two layers that are found after stage 1")
    if _AUTO.fullmatch(item):
        raise ValueError(f"{key} has {item!r}: it stands alone, without other layers, in {_SOFTMAX_LAYERS}")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
    if match is None:
        raise ValueError(f"{key} has {item!r}: {_FORMS}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"{key} has {item!r}, which ends before it begins: {_FORMS}")
    if last >= num_layers:
        raise ValueError(f"{key} names layer {last}, but the layers are 0 to {num_layers - 1}")
    return range(first, last + 1)


def _counted(word: str, count: int, num_layers: int, key: str) -> range:
    """The last of each `count` layers, or the last `count` layers."""
    if not 1 <= count <= num_layers:
        raise ValueError(
            f"{key} has '{word}:{count}', but the number must be from 1 to {num_layers}, the layers there are"
        )
    return range(count - 1, num_layers, count) if word == "every" else range(num_layers - count, num_layers)


def _items(text: str) -> Iterator[str]:
    """The parts between commas; of an empty text none."""
    return (item.strip() for item in text.split(",")) if text.strip() else iter(())
