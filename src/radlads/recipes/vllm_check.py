"""Whether vLLM can serve a model (docs/vllm.md): what `radlads export RUN --check vllm` says. It needs no vLLM."""

import math
from pathlib import Path

from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.registry import obstacles


def vllm_verdict(config: RadladsConfig, folder: Path) -> tuple[bool, list[str]]:
    """Whether vLLM can serve the model of `folder`, and the sentences that say so.

    Raises ValueError for a mixer that is not to be found.
    """
    if problems := obstacles(config, "vLLM"):
        return False, [f"{folder}: vLLM cannot serve this model", *(f"- {each}" for each in problems)]
    can = f"{folder}: vLLM can serve this model; write it with radlads export {folder} OUT, then vllm serve OUT"
    sizes = ", ".join(map(str, parallel_sizes(config)))
    megabytes = state_bytes(config, context_tokens=0) / 1e6
    return True, [
        can,
        f"- --tensor-parallel-size may be {sizes}",
        f"- a running sequence takes {megabytes:,.1f} MB of states in bf16, and a kept prefix as much",
    ]


def parallel_sizes(config: RadladsConfig) -> list[int]:
    """The numbers of processes among which heads and channels can be shared out."""
    shared = math.gcd(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return [size for size in range(1, shared + 1) if shared % size == 0]
