"""Weights without a config.json: what their shapes say of the model, and setting models up from them."""

from pathlib import Path

from radlads.checkpoint.published import UsedWeights
from radlads.checkpoint.weights import EMBEDDING, HEAD, StoredWeights
from radlads.config.schema import ModelConfig
from radlads.convert.blueprint import Blueprint, blueprint_of
from radlads.convert.hf_source import teacher_source
from radlads.convert.student import student_blueprint, student_config
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import SOFTMAX

_LAYER = "model.layers.{}.self_attn.q_proj.weight"
_MLP = "model.layers.0.mlp.gate_proj.weight"


def shape_of(weights: StoredWeights, model: ModelConfig, origin: Path) -> RadladsConfig:
    """The softmax decoder whose sizes these weights have, with the head size, RoPE base and norm epsilon of `model`.

    Raises ValueError if the weights are no decoder's, or `model` names other sizes: its head size, which no tensor
    tells, would then not be theirs either.
    """
    needed = (EMBEDDING, _LAYER.format(0), _LAYER.format(0).replace("q_proj", "k_proj"), _MLP)
    if lacking := [name for name in needed if name not in weights or len(weights.info(name).shape) != 2]:
        raise ValueError(f"{origin} lacks the matrix {lacking[0]}: it holds no model that can be read here")
    vocabulary, width = weights.info(EMBEDDING).shape
    layers = sum(_LAYER.format(layer) in weights for layer in range(len(weights)))
    if (layers, width) != (model.n_layer, model.n_embd):
        raise ValueError(
            f"{origin} has {layers} layers of width {width}, but the configuration says {model.n_layer} of width "
            f"{model.n_embd}: pass the file of the model's sizes with -c, or its folder with --model.hf_path"
        )
    queries, keys = (weights.info(name).shape[0] for name in needed[1:3])
    if queries % model.head_size or keys % model.head_size:
        raise ValueError(
            f"model.head_size is {model.head_size}, which the queries of {origin} are no multiple of: set it"
        )
    return RadladsConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights.info(_MLP).shape[0],
        num_hidden_layers=layers,
        num_attention_heads=queries // model.head_size,
        num_key_value_heads=keys // model.head_size,
        head_dim=model.head_size,
        rms_norm_eps=model.rms_norm_eps,
        attention_bias=_LAYER.format(0).replace("weight", "bias") in weights,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in weights,
        tie_word_embeddings=HEAD not in weights,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope.base},
        time_mixers=[SOFTMAX] * layers,
    )


def student_of(weights: StoredWeights, shape: RadladsConfig, model: ModelConfig, origin: Path) -> Blueprint:
    """The student that an earlier stage left as these weights."""
    config = student_config(shape, model)
    return blueprint_of(config, UsedWeights(weights, config), origin)


def student_from_teacher(weights: StoredWeights, shape: RadladsConfig, model: ModelConfig, origin: Path) -> Blueprint:
    """The student set up from a teacher's weights (see student.student_blueprint)."""
    return student_blueprint(teacher_source(origin, shape, weights), model)


def is_teachers(weights: StoredWeights) -> bool:
    """Whether no recurrent mixer has left anything in these weights."""
    marks = ("time_decay", "w0")
    return not any(name.split(".")[-1] in marks for name in weights)
