"""Our model as a published checkpoint, which the published code loads: its configuration keys and all its tensors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.manifest import write_folder_checksums
from radlads.checkpoint.model_folder import open_checked
from radlads.checkpoint.published import (
    ARCHITECTURE_OF,
    MIXER_OF,
    OPTIONAL,
    RANKS,
    SIZES,
    SWITCHES,
    UsedWeights,
    stored_in_pth,
    stored_only,
)
from radlads.checkpoint.safetensors_writer import SHARD_BYTES, write_shards
from radlads.checkpoint.strict_loading import check_fit
from radlads.checkpoint.tokenizer_files import check_copyable, copy_tokenizer, read_tokenizer
from radlads.checkpoint.weights import EMBEDDING, HEAD, CastWeights, StoredWeights, TensorInfo
from radlads.files import write_text
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import find_mixer_class, mixer_class

StoredOnly = Callable[[RadladsConfig, int, str], dict[str, tuple[tuple[int, ...], float]]]


def convert_to_published(
    source: Path,
    target: Path,
    *,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model folder `source`, a stage's, an export's or a published checkpoint, as a published checkpoint.

    The tokenizer is that of `tokenizer_folder`, or else of `source`. Memory holds one tensor. Raises ValueError if
    `target` exists, the weights are not those of the model that config.json describes, or the format has no words for
    it.
    """
    if target.suffix == ".safetensors":
        raise ValueError(f"{target} would be one file, but a published checkpoint is a folder: name a folder to write")
    if tokenizer_folder is not None:
        read_tokenizer(tokenizer_folder)
    check_copyable(tokenizer_folder or source)
    stored = open_checked(source, verify=True)
    with torch.device("meta"):
        described = RadladsForCausalLM(stored.config)
    check_fit(described, stored.used, source)
    with unfinished_folder(target, keep_failed=False) as partial:
        write_published(stored.config, stored.weights, partial, dtype=dtype, shard_bytes=shard_bytes)
        copy_tokenizer(tokenizer_folder or source, partial)
        write_folder_checksums(partial)


def write_published(
    config: RadladsConfig,
    weights: StoredWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model into a folder that exists as a published checkpoint: configuration and weights, and no code.

    Tensors that the format stores though nothing uses them are those of `weights`, or else have their initial values.
    Raises ValueError for a model the format has no words for.
    """
    kind = _kind_of(config)
    tensors = CastWeights(_FormatTensors(weights, config, stored_only), dtype)
    values = _config_values(config, kind, tensors.info(EMBEDDING).dtype)
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")
    write_shards(tensors, folder, shard_bytes=shard_bytes)


def released_tensors(weights: StoredWeights, config: RadladsConfig) -> StoredWeights:
    """A student's tensors as the released training code loads them strictly from a `.pth` file."""
    return _FormatTensors(weights, config, stored_in_pth)


class _FormatTensors(StoredWeights):
    """The tensors of the format for a model: those that `weights` hold, the head also of a model whose head is its
    embedding, and initial values for those that are stored only, where `weights` lack them.

    stored: what a layer stores only, published.stored_only or stored_in_pth.
    """

    def __init__(self, weights: StoredWeights, config: RadladsConfig, stored: StoredOnly):
        self._weights, self._dtype = weights, weights.info(EMBEDDING).dtype
        named = {
            name: shape_and_value
            for layer, mixer in enumerate(config.time_mixers)
            for name, shape_and_value in stored(config, layer, mixer).items()
        }
        used = dict.fromkeys(UsedWeights(weights, config))
        self._stored = used | dict.fromkeys(name for name in named if name in weights) | {HEAD: None}
        self._fill = {name: named[name] for name in named if name not in weights}
        self._head = EMBEDDING if config.tie_word_embeddings else HEAD

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._fill:
            shape, value = self._fill[name]
            return torch.full(shape, value, dtype=self._dtype)
        return self._weights[self._head if name == HEAD else name]

    def info(self, name: str) -> TensorInfo:
        if name in self._fill:
            return TensorInfo(self._fill[name][0], self._dtype)
        return self._weights.info(self._head if name == HEAD else name)

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self._fill

    def __len__(self) -> int:
        return len(self._stored) + len(self._fill)


def _kind_of(config: RadladsConfig) -> str:
    """The model type that can say what the model is. Raises ValueError if none can."""
    recurrent = {name for name in config.time_mixers if name != "qwen2"}
    kinds = [kind for kind, mixer in MIXER_OF.items() if recurrent == {mixer}]
    if not kinds:
        found = " and ".join(map(_with_obstacle, sorted(recurrent))) or "softmax alone"
        raise ValueError(
            f"the published format holds stacks of rad_rwkv6 or of rad_rwkv7, not of {found}: "
            "export the model with its code instead"
        )
    (kind,) = kinds
    for layer, name in enumerate(config.time_mixers):
        if why := mixer_class(name).obstacle_in(config, layer, "published format"):
            raise ValueError(f"the published format does not hold this {name}: {why}: export it with its code instead")
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
    if kind == "rwkv7qwen2" and config.gate_rank_type == 0:
        raise ValueError(
            "the published code of RAD-RWKV7 does not run without a gate (gate_rank_type 0): export the model with its "
            "code instead"
        )
    if softmax and not config.use_rope:
        raise ValueError(
            "the published code does not run softmax layers in a model without RoPE (use_rope false): "
            "export the model with its code instead"
        )
    if set(config.channel_mixers) - {"swiglu", "qwen2"}:
        raise ValueError("the published format has gated MLPs only: export the model with its code instead")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            "the published format has heads that share the hidden size evenly, and this model's do not: "
            "export it with its code instead"
        )
    if config.qk_norm:
        raise ValueError(
            "the published format has no norms of queries and keys (q_norm, k_norm): export the model with its code "
            "instead"
        )
    return kind


def _with_obstacle(mixer: str) -> str:
    """A mixer's name, and why the format does not hold it, if it says so itself."""
    kind = find_mixer_class(mixer)
    why = None if kind is None else kind.obstacle("published format")
    return mixer if why is None else f"{mixer} ({why})"


def _config_values(config: RadladsConfig, kind: str, dtype: torch.dtype) -> dict[str, Any]:
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
