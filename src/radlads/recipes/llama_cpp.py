"""Whether llama.cpp can run a model, and the folder that its converter turns into GGUF.

Owns what llama.cpp's RWKV6Qwen2 can and cannot do. Leaves the format, that of the published checkpoints, to
checkpoint/published_export.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from radlads.checkpoint.published_export import write_published
from radlads.checkpoint.tokenizer_files import TOKENIZER_FILE, copy_tokenizer
from radlads.checkpoint.weights import ModelWeights, StoredWeights
from radlads.files import read_json
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.rad_rwkv6 import MIN_LOG_DECAY
from radlads.model.registry import CHANNEL_MIXERS, find_mixer_class, known_mixers

CONVERT = "python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype f16"


@dataclass(frozen=True)
class Verdict:
    """obstacles: why llama.cpp cannot run a model; none if it can. notes: what to know when it does."""

    obstacles: list[str]
    notes: list[str]

    def lines(self, folder: Path) -> list[str]:
        """The verdict on the model of `folder`, as sentences."""
        if self.obstacles:
            return [f"{folder}: llama.cpp cannot run this model", *(f"- {each}" for each in self.obstacles)]
        can = f"{folder}: llama.cpp can run this model; write it with radlads export {folder} OUT --for-llama-cpp"
        return [can, *(f"- {each}" for each in self.notes)]


def verdict(config: RadladsConfig, weights: StoredWeights, tokenizer_folder: Path) -> Verdict:
    """What llama.cpp makes of a model, by its configuration, decays and tokenizer."""
    obstacles = _obstacles(config)
    return Verdict(obstacles, [] if obstacles else _notes(config, weights, tokenizer_folder))


def write_for_llama_cpp(model: RadladsForCausalLM, tokenizer_folder: Path, folder: Path, *, shard_bytes: int) -> None:
    """Write the model into a folder that exists as what llama.cpp's converter reads: RWKV6Qwen2ForCausalLM with its
    head written out and a token shift of zeros where there is none. check_runs has accepted it."""
    assert not _obstacles(model.config)
    write_published(model.config, ModelWeights(model), folder, shard_bytes=shard_bytes)
    copy_tokenizer(tokenizer_folder, folder)


def check_runs(config: RadladsConfig) -> None:
    """Raise ValueError that says why llama.cpp cannot run a model, if it cannot."""
    if obstacles := _obstacles(config):
        raise ValueError(
            f"llama.cpp cannot run this model: {'; '.join(obstacles)}: leave out --for-llama-cpp, or convert again "
            f"with --mixer {' or '.join(_suitable_mixers())}"
        )


def _obstacles(config: RadladsConfig) -> list[str]:
    layers = {name: layer for layer, name in enumerate(config.time_mixers)}
    kinds = [(find_mixer_class(name), layers[name]) for name in sorted(layers)]
    of_mixers = [
        kind.obstacle_in(config, layer, "llama.cpp") if kind else "it has mixers of your own" for kind, layer in kinds
    ]
    found = list(dict.fromkeys(text for text in of_mixers if text is not None))
    if set(config.channel_mixers) - set(CHANNEL_MIXERS):
        found.append("it has channel mixers that are no gated MLPs")
    if None in of_mixers:
        found += [text for text, applies in _switch_obstacles(config).items() if applies]
    return found


def _suitable_mixers() -> list[str]:
    return [name for name, kind in known_mixers().items() if kind.obstacle("llama.cpp") is None]


def _switch_obstacles(config: RadladsConfig) -> dict[str, bool]:
    """Each thing that its RWKV6Qwen2 computes in another way, without a word, and whether the model has it."""
    return {
        "its RWKV6Qwen2 has no RoPE (use_rope)": config.use_rope,
        "its RWKV6Qwen2 has a full-rank gate only (gate_rank_type 1)": config.gate_rank_type != 1,
        "its RWKV6Qwen2 balances the state (balance_state)": not config.balance_state,
        "its RWKV6Qwen2 has no GroupNorm (groupnorm_att)": config.groupnorm_att,
        "its RWKV6Qwen2 has no norms of queries and keys (qk_norm)": config.qk_norm,
        "its heads share the hidden size evenly, and this model's do not": (
            config.head_dim * config.num_attention_heads != config.hidden_size
        ),
    }


def _notes(config: RadladsConfig, weights: StoredWeights, tokenizer_folder: Path) -> list[str]:
    floor = math.exp(MIN_LOG_DECAY)
    if fastest_decay(config, weights) < -MIN_LOG_DECAY:
        decay = f"no decay of this model can reach the floor of {floor:.4f} that llama.cpp lacks: the logits are ours"
    else:
        decay = f"llama.cpp has no floor of {floor:.4f} under the decay, which this model may reach: logits may differ"
    notes = [decay, "llama.cpp decodes wrongly after prompts that were read together: run its server with -np 1"]
    if not _splits_as_qwen2(tokenizer_folder):
        notes.append(
            "the tokenizer does not split text as Qwen2's does: llama.cpp's converter may not recognise it, and says so"
        )
    return notes


def fastest_decay(config: RadladsConfig, weights: StoredWeights) -> float:
    """An upper bound of -log w over all inputs, as tanh lies in (-1, 1); the model itself stops at -MIN_LOG_DECAY."""
    bounds = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn.time_decay"
        reach = weights[f"{prefix}_w2"].float().abs().sum(dim=0)
        bounds.append((weights[prefix].float().flatten() + reach).max().exp().item())
    return max(bounds)


def _splits_as_qwen2(tokenizer_folder: Path) -> bool:
    path = tokenizer_folder / TOKENIZER_FILE
    pre_tokenizer = read_json(path).get("pre_tokenizer") if path.is_file() else None
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    return any((step.get("pattern") or {}).get("Regex") == PRETOKENIZE_REGEX for step in steps)
