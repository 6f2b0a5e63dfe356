"""Whether a configuration describes the weights beside it: their sizes, their type, and whose matrix the head is."""

import re
from pathlib import Path

import torch

from radlads.checkpoint.strict_loading import check_floats
from radlads.checkpoint.weights import EMBEDDING, HEAD, StoredWeights
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import known_mixers

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_described(config: RadladsConfig, weights: StoredWeights, origin: Path) -> None:
    """Raise ValueError if the weights are quantised, or of other sizes than the configuration says.

    No tensor is read, and nothing is built: sizes that are not the weights' could ask for any amount of memory.
    """
    check_floats(weights, origin)
    if EMBEDDING not in weights:
        raise ValueError(f"{origin} lacks {EMBEDDING}: its weights are incomplete, or it is not a supported model")
    num_layers = 1 + max((int(match[1]) for match in map(_LAYER.match, weights) if match), default=-1)
    if num_layers != config.num_hidden_layers:
        raise ValueError(
            f"the weights of {origin} have {num_layers} layers, but its configuration says "
            f"{config.num_hidden_layers}: take both from the same model"
        )
    for name, shape in _shapes(config).items():
        if name in weights and weights.info(name).shape != shape:
            raise ValueError(
                f"{name} in {origin} has shape {weights.info(name).shape}, but its configuration says {shape}: "
                "take both from the same model"
            )


def keep_own_head(config: RadladsConfig, weights: StoredWeights) -> bool:
    """Untie the configuration's head if the weights hold one that is not the embedding, and say whether that was so.

    What config.json says of it is then wrong; transformers goes by the weights too.
    """
    if not config.tie_word_embeddings or HEAD not in weights or _head_is_embedding(weights):
        return False
    config.tie_word_embeddings = False
    return True


def _head_is_embedding(weights: StoredWeights) -> bool:
    head, embedding = weights[HEAD], weights[EMBEDDING]
    if head.dtype != embedding.dtype:
        head, embedding = head.float(), embedding.float()
    return torch.equal(head, embedding)


def _shapes(config: RadladsConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of matrices that all models have, and of those in the first layer that are as in a teacher."""
    channels = config.hidden_size
    in_all: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, channels), HEAD: (config.vocab_size, channels)}
    of_mixer: dict[str, tuple[int, ...]] = {
        "q_proj": (config.num_attention_heads * config.head_dim, channels),
        "k_proj": (config.num_key_value_heads * config.head_dim, channels),
    }
    # A mixer of one's own may have other matrices of these names, and opening a folder runs no file to ask it
    kind = known_mixers().get(config.time_mixers[0])
    from_teacher = () if kind is None else kind.from_teacher
    taken = {f"model.layers.0.self_attn.{name}.weight": of_mixer[name] for name in of_mixer if name in from_teacher}
    gate: dict[str, tuple[int, ...]] = {"model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, channels)}
    return in_all | taken | gate
