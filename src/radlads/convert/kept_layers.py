"""The teacher's softmax attention put back into layers of a student that was made without it.

Owns what such a student is: its configuration, which weight comes from which model, and its time mixers. Norms and
channel mixers stay the student's. Leaves which layers, and why, to selection/ and to the user.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from radlads.checkpoint.model_folder import unfilled_model, unplaced_model
from radlads.checkpoint.strict_loading import load_strict
from radlads.checkpoint.weights import ModelWeights, StoredWeights, TensorInfo
from radlads.convert.blueprint import Blueprint, blueprint_of
from radlads.model.block import Block
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import SOFTMAX, build_time_mixer
from radlads.model.time_mixer import TimeMixer


def kept_config(student: RadladsConfig, layers: Iterable[int]) -> RadladsConfig:
    """The student's configuration with softmax attention in these layers too."""
    kept = set(layers)
    mixers = [SOFTMAX if layer in kept else name for layer, name in enumerate(student.time_mixers)]
    types = ["full_attention" if layer in kept else kind for layer, kind in enumerate(student.layer_types)]
    settings = {name: held for name, held in student.mixer_settings.items() if name in mixers}
    changed = {"time_mixers": mixers, "layer_types": types, "mixer_settings": settings}
    return RadladsConfig.from_dict(student.to_dict() | changed)


def kept_blueprint(student: Blueprint, teacher: StoredWeights, layers: Iterable[int], origin: Path) -> Blueprint:
    """A stored student with the teacher's attention in these layers. Raises ValueError as KeptWeights."""
    assert student.stored is not None
    config = kept_config(student.config, layers)
    return blueprint_of(config, KeptWeights(student.stored, teacher, config, layers), origin)


def kept_student(student: RadladsForCausalLM, teacher: RadladsForCausalLM, layers: Iterable[int]) -> RadladsForCausalLM:
    """A copy of the student with the teacher's attention in these layers, where and in the type that the student is."""
    config = kept_config(student.config, layers)
    weights = KeptWeights(ModelWeights(student), ModelWeights(teacher), config, layers)
    with torch.random.fork_rng(devices=[]):
        model = unfilled_model(config, student.dtype, student.device)
    load_strict(model, weights, "the student")
    return model.eval()


def share_embedding(student: StoredWeights, teacher: StoredWeights) -> bool:
    """True if the embeddings are equal in bf16: those of an aligned student and its teacher are."""
    own, others = (weights["model.embed_tokens.weight"].bfloat16() for weights in (student, teacher))
    return torch.equal(own, others)


class KeptWeights(StoredWeights):
    """The weights of a kept_config: the teacher's attention in these layers, and else the student's.

    Raises ValueError if one is not there. What the student has and the new model lacks is left out: its mixers in these
    layers, and of the layer that now is the first of its kind what mixes in earlier values.
    """

    def __init__(self, student: StoredWeights, teacher: StoredWeights, config: RadladsConfig, layers: Iterable[int]):
        prefixes = tuple(f"model.layers.{layer}.self_attn." for layer in layers)
        with torch.random.fork_rng(devices=[]):
            names = [name for name, _ in unplaced_model(config, torch.float32).named_parameters()]
        self._source: Mapping[str, StoredWeights] = {
            name: teacher if name.startswith(prefixes) else student for name in names
        }
        for whose, weights in {"teacher": teacher, "student": student}.items():
            held = set(weights)  # to ask for a name reads some weights
            if missing := [name for name, source in self._source.items() if source is weights and name not in held]:
                raise ValueError(f"the {whose} has no {missing[0]}, which the student with softmax layers needs")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[name][name]

    def info(self, name: str) -> TensorInfo:
        return self._source[name].info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


class KeptMixers:
    """The time mixers of students that keep layers, without copies: `of` any layers gives one for each layer.

    Both models are on one device, of one type, and must not change while this is in use.
    """

    def __init__(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM):
        self._student, self._teacher = student, teacher
        self._first_value_mixers: dict[int, TimeMixer] = {}

    def of(self, layers: Iterable[int]) -> list[TimeMixer]:
        """Each layer's mixer in a student that keeps `layers`: what a model of kept_config has there."""
        kept = set(layers)
        mixers = [_mixer(self._teacher if layer in kept else self._student, layer) for layer in self._layers()]
        config = self._student.config
        if config.first_value_layer in kept:
            config = kept_config(config, kept)
            if (first := config.first_value_layer) is not None:
                mixers[first] = self._first_value_mixer(first, config)
        return mixers

    def _layers(self) -> range:
        return range(self._student.config.num_hidden_layers)

    def _first_value_mixer(self, layer: int, config: RadladsConfig) -> TimeMixer:
        """The student's mixer as the first of its kind, which has fewer parameters: it is built anew."""
        if layer not in self._first_value_mixers:
            with torch.random.fork_rng(devices=[]):
                built = build_time_mixer(config, layer)
            own = _mixer(self._student, layer).state_dict()
            built.load_state_dict({name: own[name] for name in built.state_dict()})
            self._first_value_mixers[layer] = built.to(self._student.device, self._student.dtype).eval()
        return self._first_value_mixers[layer]


def _mixer(model: RadladsForCausalLM, layer: int) -> TimeMixer:
    block = model.model.layers[layer]
    assert isinstance(block, Block)
    mixer: TimeMixer = block.self_attn
    return mixer
