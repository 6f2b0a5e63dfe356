"""Teacher and student by name, before any weight is read: what benchmarks, plans and conversions have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from radlads.checkpoint.model_folder import read_config
from radlads.checkpoint.named_models import NAMED_MODELS
from radlads.config.layer_lists import (
    mixer_names,
    num_selected,
    selectable_layers,
    uniform_layers,
    with_softmax_layers,
)
from radlads.config.load import load_config
from radlads.config.schema import ModelConfig
from radlads.convert.hf_source import SUPPORTED_ARCHITECTURES, locate, teacher_config
from radlads.convert.student import student_config
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import DEFAULT, SOFTMAX, known_mixers, mixer_class, name_mixers, registered_name

# Layers, hidden size, channel mixer, heads, key/value heads, vocabulary, tied head
QWEN25 = {
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "72b": (80, 8192, 29568, 64, 8, 152064, False),
}
NAMED_SIZES = QWEN25 | {"tiny": (2, 128, 256, 4, 2, 512, False)}
SIZE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)
MAX_POSITIONS, TINY_MAX_POSITIONS = 131072, 32768

MEASURED_VARIANT = "group_norm"
"""The released 7B's: what is measured and planned where no variant is named and the mixer has this one."""
# Beside them, of mixers of ours without variants too: the paper's gate for RAD-RWKV7
_MEASURED_KEYS: Mapping[str, object] = {
    "model.gate_rank_type": 2,
    "model.balance_state": 1,
    "model.groupnorm_att": 0,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The two models of a measurement or a plan: configurations of the softmax teacher and of the student that
    replaces it. name: as open_shape has it."""

    name: str
    teacher: RadladsConfig
    student: RadladsConfig

    def sizes(self) -> dict[str, int]:
        """The sizes that decide cost, by their configuration keys."""
        return {name: getattr(self.student, name) for name in (*SIZE_KEYS, "head_dim")}


def open_shape(
    name: str,
    *,
    mixer: str = DEFAULT,
    variant: str | None = None,
    layers: int | None = None,
    overrides: Mapping[str, object] = MappingProxyType({}),
) -> Shape:
    """Teacher and student of a size ("7b", "tiny"), a Hugging Face folder, a GGUF file or a named model.

    mixer: any that the registry finds. variant: see measured_variant. layers: instead of the teacher's. overrides: keys
    of the model section, such as {"model.preserve_last_n_layers": 4}; softmax_layers auto:K counts as K layers at equal
    distances, for costs are the same whichever they are. Raises ValueError for an unknown name, mixer,
    variant or key, and for a folder that is no model we know.
    """
    if layers is not None and layers < 1:
        raise ValueError(f"--layers must be 1 or more, not {layers}")
    model = _student_model(mixer, variant, overrides)
    teacher = _with_layers(_teacher(name), layers)
    student = student_config(teacher, model)
    if number := num_selected(model):
        layers_of_any = uniform_layers(selectable_layers(model, teacher.num_hidden_layers), number)
        student = student_config(teacher, with_softmax_layers(model, layers_of_any))
    return Shape(name=name, teacher=teacher, student=student)


def measured_variant(mixer: str, variant: str | None) -> str | None:
    """The variant that is measured: the one named, else the released 7B's or the mixer's first; None if it has none."""
    return variant_of(mixer, variant, preferred=MEASURED_VARIANT)


def variant_of(mixer: str, variant: str | None, *, preferred: str = "") -> str | None:
    """The variant of a mixer that --variant names. For None: `preferred` if the mixer has it, else its first; None if
    it has no variants.

    The user has asked for this mixer, so that it may come from anywhere. Raises ValueError for an unknown mixer, and a
    variant that it does not have.
    """
    name_mixers(mixer)
    known = mixer_class(mixer).variants
    if variant is None:
        return preferred if preferred in known else next(iter(known), None)
    if variant in known:
        return variant
    if owners := [name for name, kind in known_mixers().items() if variant in kind.variants]:
        raise ValueError(f"--variant {variant} belongs to --mixer {' or '.join(owners)}")
    if known:
        raise ValueError(f"--variant must be one of {', '.join(known)}, not {variant!r}")
    raise ValueError(f"--mixer {mixer} has no variants: leave out --variant {variant}")


def variant_keys(mixer: str, variant: str | None) -> dict[str, object]:
    """The configuration keys of a variant_of() a mixer."""
    values = {} if variant is None else mixer_class(mixer).variants[variant]
    return {f"model.{key}": value for key, value in values.items()}


def _student_model(mixer: str, variant: str | None, overrides: Mapping[str, object]) -> ModelConfig:
    for key in overrides:
        if not key.startswith("model."):
            raise ValueError(f"--set {key} has no effect here: only keys of the model section make another model")
        if key == "model.tmix":
            raise ValueError(f"--set {key} is not possible: name the mixer with --mixer")
    keys = {**_MEASURED_KEYS, **variant_keys(mixer, measured_variant(mixer, variant))}
    model = load_config([], {**keys, "model.tmix": registered_name(mixer), **overrides}).model
    name_mixers(*mixer_names(model))
    return model


def _teacher(name: str) -> RadladsConfig:
    if name.lower() in NAMED_SIZES:
        return _softmax_config(name.lower())
    path = Path(name).expanduser()
    if not path.exists() and name not in NAMED_MODELS:
        raise ValueError(
            f"no size, folder or file {name!r}: choose one of {', '.join((*NAMED_SIZES, *NAMED_MODELS))}, a Hugging "
            "Face folder or a GGUF file"
        )
    folder = locate(name)
    return teacher_config(read_config(folder, *SUPPORTED_ARCHITECTURES), folder)


def _softmax_config(size: str) -> RadladsConfig:
    layers, channels, inner, heads, kv_heads, vocab, tied = NAMED_SIZES[size]
    return RadladsConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=MAX_POSITIONS if size in QWEN25 else TINY_MAX_POSITIONS,
        time_mixers=[SOFTMAX] * layers,
    )


def _with_layers(teacher: RadladsConfig, layers: int | None) -> RadladsConfig:
    if layers is None:
        return teacher
    per_layer = {"time_mixers": [SOFTMAX] * layers, "channel_mixers": [], "layer_types": []}
    return RadladsConfig.from_dict(teacher.to_dict() | {"num_hidden_layers": layers} | per_layer)
