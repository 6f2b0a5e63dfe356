"""Our model as a published checkpoint, which the published code loads: its configuration keys and all its tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from radlads.checkpoint.atomic import unfinished_folder, write_text
from radlads.checkpoint.hf_export import copy_tokenizer
from radlads.checkpoint.published import (
    ARCHITECTURE_OF,
    EMBEDDING,
    HEAD,
    MIXER_OF,
    OPTIONAL,
    RANKS,
    SIZES,
    SWITCHES,
    stored_only,
)
from radlads.checkpoint.weight_files import SHARD_BYTES, write_shards
from radlads.checkpoint.weights import StoredWeights, TensorInfo
from radlads.model.modeling import RadladsForCausalLM


def export_published(
    model: RadladsForCausalLM,
    target: Path,
    *,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model to the new folder `target` as a published checkpoint: configuration, weights, and no code.

    Tensors that the format stores though nothing uses them get their initial values. Raises ValueError if `target`
    exists, or for a model the format has no words for.
    """
    kind = _kind_of(model)
    parameters = _ModelWeights(model, dtype)
    with unfinished_folder(target) as partial:
        write_text(partial / "config.json", json.dumps(_config_values(model, kind, parameters.dtype), indent=2) + "\n")
        write_shards(parameters, partial, shard_bytes=shard_bytes)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, partial)


class _ModelWeights(StoredWeights):
    """A model's parameters in `dtype` (default: their own), and the tensors that are stored only."""

    def __init__(self, model: RadladsForCausalLM, dtype: torch.dtype | None):
        self.dtype = dtype or next(model.parameters()).dtype
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._parameters.setdefault(HEAD, self._parameters[EMBEDDING])
        self._fill = {
            name: shape_and_value
            for layer, mixer in enumerate(model.config.time_mixers)
            for name, shape_and_value in stored_only(model.config, layer, mixer).items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._fill:
            shape, value = self._fill[name]
            return torch.full(shape, value, dtype=self.dtype)
        return self._parameters[name].to("cpu", self.dtype)

    def info(self, name: str) -> TensorInfo:
        shape = self._fill[name][0] if name in self._fill else tuple(self._parameters[name].shape)
        return TensorInfo(shape, self.dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._parameters
        yield from self._fill

    def __len__(self) -> int:
        return len(self._parameters) + len(self._fill)


def _kind_of(model: RadladsForCausalLM) -> str:
    """The model type that can say what the model is. Raises ValueError if none can."""
    config = model.config
    recurrent = {name for name in config.time_mixers if name != "qwen2"}
    kinds = [kind for kind, mixer in MIXER_OF.items() if recurrent == {mixer}]
    if not kinds:
        found = " and ".join(sorted(recurrent)) or "softmax alone"
        raise ValueError(
            f"the published format holds stacks of rad_rwkv6 or of rad_rwkv7, not of {found}: "
            "export the model with its code instead"
        )
    (kind,) = kinds
    softmax = config.time_mixers.count("qwen2")
    if "qwen2" in config.time_mixers[: len(config.time_mixers) - softmax]:
        raise ValueError(
            "the published format holds softmax layers at the end of the stack only: "
            "export the model with its code instead"
        )
    if softmax and kind == "rwkv6qwen2":
        raise ValueError(
            "the published format has no softmax layers beside RAD-RWKV6: export the model with its code instead"
        )
    if set(config.channel_mixers) - {"swiglu", "qwen2"}:
        raise ValueError("the published format has gated MLPs only: export the model with its code instead")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            "the published format has heads that share the hidden size evenly, and this model's do not: "
            "export it with its code instead"
        )
    unknown = [name for name, _ in model.named_parameters() if name.split(".")[-2] in ("q_norm", "k_norm")]
    if unknown:
        raise ValueError(f"the published format has no {unknown[0]}: export the model with its code instead")
    return kind


def _config_values(model: RadladsForCausalLM, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    config = model.config
    rope = {name: value for name, value in config.rope_parameters.items() if name != "rope_theta"}
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE_OF[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "attention_output_bias": False,
        "num_attention_layers": config.time_mixers.count("qwen2"),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    values |= {name: getattr(config, name) for name in (*SIZES, *OPTIONAL, *RANKS[kind])}
    values |= {name: type(default)(getattr(config, name)) for name, default in SWITCHES[kind].items()}
    if kind == "rwkv7qwen2":
        values["use_tokenshift"] = False
    return dict(sorted(values.items()))
