"""What is refused before a model is loaded, and the part of a model that one of several processes serves."""

import copy
from collections.abc import Iterator

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from radlads.model.configuration import RadladsConfig
from radlads.model.registry import obstacles


class Checks(VerifyAndUpdateConfig):
    """vLLM calls these while it reads its options, in the process that the user started."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Raise ValueError for a model that has a layer the plugin does not serve."""
        if problems := obstacles(own_config(model_config), "vLLM"):
            raise ValueError(f"vLLM cannot serve this model: {'; '.join(problems)}: use radlads serve")

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ValueError for options that the plugin would get wrong."""
        for problem in refused_options(vllm_config):
            raise ValueError(problem)


def own_config(model_config: ModelConfig) -> RadladsConfig:
    """The model's configuration as this radlads reads it: vLLM may have taken the class from the model's folder."""
    return RadladsConfig.from_dict(model_config.hf_config.to_dict())


def refused_options(vllm_config: VllmConfig) -> Iterator[str]:
    """Why options cannot be served, one sentence with the remedy each."""
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        yield "radlads models have no speculative decoding in vLLM: leave out --speculative-config"
    if vllm_config.lora_config is not None:
        yield "radlads models take no LoRA adapters in vLLM: merge them into the model, and leave out --enable-lora"
    if parallel.pipeline_parallel_size > 1:
        yield "radlads models cannot be split by layers in vLLM: use --tensor-parallel-size instead"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "radlads models cannot be split by context in vLLM: use --tensor-parallel-size"
    if vllm_config.model_config.runner_type != "generate":
        yield "radlads models generate text in vLLM, and nothing else: leave out --runner and --convert"
    if vllm_config.kv_transfer_config is not None:
        yield "the states of radlads models cannot be sent to another vLLM: leave out --kv-transfer-config"
    config, size = own_config(vllm_config.model_config), parallel.tensor_parallel_size
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (number := getattr(config, key)) % size:
            yield f"--tensor-parallel-size {size} does not divide the model's {number} {key}: choose a divisor of it"


def own_share(config: RadladsConfig, num_processes: int) -> RadladsConfig:
    """The configuration of what one process computes: its heads, and its channels of the gated MLPs. A mixer that is
    built from it has parameters of the right sizes, and its mathematics are unchanged."""
    share = copy.deepcopy(config)
    share.num_attention_heads //= num_processes
    share.num_key_value_heads //= num_processes
    share.intermediate_size //= num_processes
    return share
