"""What vLLM calls in each of its processes: it makes models of type `radlads` known there.

Imports little at the top: vLLM runs it for every model that it serves, and most are not ours.
"""

TESTED = ((0, 30), (0, 32))
"""The oldest and the newest minor version of vLLM that tests/vllm has run on."""
ARCHITECTURE = "RadladsForCausalLM"
OPERATOR = "radlads_mix"
"""The custom operator of a recurrent layer (states.py); torch.compile's graph is cut there."""


def register() -> None:
    """Tell transformers and vLLM of our models. Calling it again changes nothing.

    On a version of vLLM that is not tested, only models of ours are refused, once their config.json is read.
    """
    from transformers import AutoConfig
    from vllm.version import __version_tuple__

    from radlads.model.configuration import RadladsConfig

    version = tuple(__version_tuple__[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        AutoConfig.register(RadladsConfig.model_type, _refusing(RadladsConfig, version), exist_ok=True)
        return
    from vllm.config import CompilationConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from radlads.vllm_plugin.checks import Checks

    AutoConfig.register(RadladsConfig.model_type, RadladsConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"radlads.vllm_plugin.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Checks
    operator = f"vllm::{OPERATOR}"
    if operator not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operator)


def _refusing(kind: type, version: tuple) -> type:
    """A configuration that raises ValueError, which names the versions that are tested."""

    def refuse(self: object, **values: object) -> None:
        low, high = (".".join(map(str, each)) for each in TESTED)
        found = ".".join(map(str, version))
        raise ValueError(f"radlads serves models with vLLM {low} to {high}, and this is {found}: install one of these")

    return type(kind.__name__, (kind,), {"__post_init__": refuse, "__module__": __name__})
