"""The models that are measured: shapes by name or from a Hugging Face folder, random weights made on the device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from radlads.checkpoint.model_folder import read_config
from radlads.config.schema import ModelConfig
from radlads.convert.hf_source import SUPPORTED_ARCHITECTURES, teacher_config
from radlads.convert.student import student_config
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

Variant = Literal["balanced", "group_norm"]
MIXERS = ("rad_rwkv6", "rad_rwkv7")

WEIGHT_STD = 0.02
# Fresh vectors near their initial values; RAD-RWKV7's and RAD-RWKV6's decays are those of a middle channel
_FRESH_VECTORS = {"w0": -4.0, "time_decay": -3.5, "v0": 1.0, "k_k": 0.85, "k_a": 1.0}

SIZES_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
SIZES_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
NAMED_SIZES = {"7b": SIZES_7B, "tiny": SIZES_TINY}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The two models of a measurement: configurations of the softmax teacher and of the student that replaces it."""

    name: str
    teacher: RadladsConfig
    student: RadladsConfig

    def sizes(self) -> dict[str, int]:
        """The sizes that decide cost, by their configuration keys."""
        return {name: getattr(self.student, name) for name in (*SIZES_TINY, "head_dim")}


def open_shape(name: str, *, layers: int | None, mixer: str, variant: Variant) -> Shape:
    """The shape called `name` ("7b", "tiny", or a folder with a config.json), with `layers` layers if given.

    Raises ValueError for an unknown name, another architecture than Qwen2, or a mixer without that variant.
    """
    if mixer not in MIXERS:
        raise ValueError(f"--mixer must be {' or '.join(MIXERS)}, not {mixer!r}")
    if layers is not None and layers < 1:
        raise ValueError(f"--layers must be 1 or more, not {layers}")
    teacher = _with_layers(_teacher(name), layers)
    group_norm = variant == "group_norm" and mixer == "rad_rwkv7"
    model = ModelConfig(
        tmix=mixer, gate_rank_type=2, balance_state=0 if group_norm else 1, groupnorm_att=1 if group_norm else 0
    )
    return Shape(name=name, teacher=teacher, student=student_config(teacher, model))


def _teacher(name: str) -> RadladsConfig:
    if name in NAMED_SIZES:
        return _softmax_config(NAMED_SIZES[name], tied=False)
    folder = Path(name)
    if not folder.is_dir():
        known = ", ".join(NAMED_SIZES)
        raise ValueError(f"no shape {name!r}: choose one of {known}, or a Hugging Face folder with a config.json")
    return teacher_config(read_config(folder, *SUPPORTED_ARCHITECTURES), folder)


def _with_layers(teacher: RadladsConfig, layers: int | None) -> RadladsConfig:
    if layers is None:
        return teacher
    per_layer = {"time_mixers": ["qwen2"] * layers, "channel_mixers": [], "layer_types": []}
    return RadladsConfig.from_dict(teacher.to_dict() | {"num_hidden_layers": layers} | per_layer)


def _softmax_config(sizes: dict[str, Any], *, tied: bool) -> RadladsConfig:
    mixers = ["qwen2"] * sizes["num_hidden_layers"]
    return RadladsConfig(**sizes, tie_word_embeddings=tied, time_mixers=mixers)


def random_model(config: RadladsConfig, *, device: torch.device, dtype: torch.dtype) -> RadladsForCausalLM:
    """A model with random weights, made on the device in `dtype`: no copy of them is ever held on the CPU.

    Low-rank factors that a conversion starts from zero are random too, so that every kernel sees real data.
    """
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    assert not list(model.buffers()), "a buffer would be left without a value"
    model = model.to(dtype).to_empty(device=device)  # type: ignore[arg-type]
    model.tie_weights()
    for name, parameter in model.named_parameters():
        _fill(name, parameter)
    return model.eval()


@torch.no_grad()
def _fill(name: str, parameter: torch.Tensor) -> None:
    own_name = name.rpartition(".")[2]
    parameter.normal_(0.0, WEIGHT_STD)
    if name.endswith(("norm.weight", "ln_x.weight")):
        parameter.add_(1.0)
    elif own_name in _FRESH_VECTORS:
        parameter.add_(_FRESH_VECTORS[own_name])


def stock_teacher(config: RadladsConfig, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own Qwen2 of the teacher's sizes with SDPA: what runs where nothing is converted."""
    sizes = {name: getattr(config, name) for name in SIZES_TINY}
    stock = Qwen2Config(
        **sizes, tie_word_embeddings=config.tie_word_embeddings, rope_parameters=dict(config.rope_parameters)
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(stock, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])
