"""Names of mixers, and the paper's rule for a user's own: `tmix.tmix_{name}.TMix_{name}` on the import path."""

import importlib
from collections.abc import Callable

from .configuration import MIXER_ALIASES, RadladsConfig
from .rad_rwkv6 import RadRwkv6
from .rad_rwkv7 import RadRwkv7
from .softmax_attention import SoftmaxAttention
from .swiglu import SwiGLU

TIME_MIXERS: dict[str, Callable] = {"qwen2": SoftmaxAttention, "rad_rwkv6": RadRwkv6, "rad_rwkv7": RadRwkv7}
CHANNEL_MIXERS: dict[str, Callable] = {"swiglu": SwiGLU, "qwen2": SwiGLU}


def build_time_mixer(config: RadladsConfig, layer_idx: int):
    """The time mixer that `config.time_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    name = config.time_mixers[layer_idx]
    return _find(TIME_MIXERS, MIXER_ALIASES.get(name, name), "tmix", "TMix")(config, layer_idx)


def build_channel_mixer(config: RadladsConfig, layer_idx: int):
    """The channel mixer that `config.channel_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    return _find(CHANNEL_MIXERS, config.channel_mixers[layer_idx], "cmix", "CMix")(config, layer_idx)


def is_ours(mixer: object) -> bool:
    """True for a time mixer of exactly one of our classes, which know what SharedInputs.texts asks of them."""
    return type(mixer) in TIME_MIXERS.values()


def is_registered(config: RadladsConfig) -> bool:
    """True if all of the model's mixers are ours, so that model/ alone can run it."""
    return set(config.time_mixers) <= set(TIME_MIXERS) and set(config.channel_mixers) <= set(CHANNEL_MIXERS)


def _find(registered: dict[str, Callable], name: str, folder: str, prefix: str) -> Callable:
    if name in registered:
        return registered[name]
    module_name = f"{folder}.{folder}_{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in (folder, module_name):
            raise
        known = ", ".join(sorted(registered))
        raise ValueError(
            f"no mixer named {name!r}: use one of {known}, or put {folder}/{folder}_{name}.py on the import path"
        ) from error
    if not hasattr(module, f"{prefix}_{name}"):
        raise ValueError(f"{module.__file__} must define a class {prefix}_{name}")
    return getattr(module, f"{prefix}_{name}")
