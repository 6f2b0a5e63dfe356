"""Tiny random models, what radlads itself makes of prompts, and vLLM engines that are asked for the same."""

import gc
import json
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

from radlads.checkpoint.hf_export import export
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

LENGTHS = (5, 1, 37, 200, 3, 64, 129, 33)
NEW_TOKENS = 24
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "eos_token_id": 256,
}


def write_model(folder: Path, **values) -> Path:
    """A random model in fp32, every parameter moved from where it starts, as `radlads export` writes it."""
    teacher = folder / "teacher"
    teacher.mkdir(parents=True)
    tiny.save_tokenizer(teacher)
    torch.manual_seed(3)
    model = RadladsForCausalLM(RadladsConfig(**(SIZES | values))).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    export(model, teacher, folder / "hf")
    return folder / "hf"


def prompts() -> list[list[int]]:
    """Random token ids: prompts of every length that a step of an engine treats in a way of its own."""
    torch.manual_seed(11)
    return [torch.randint(0, 256, (length,)).tolist() for length in LENGTHS]


@torch.no_grad()
def expected(folder: Path, asked: list[list[int]] | None = None) -> list[list[int]]:
    """radlads' own greedy tokens in fp32, one prompt after the other."""
    model = RadladsForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in asked or prompts():
        token, cache, tokens = torch.tensor([ids]), None, []
        for _ in range(NEW_TOKENS):
            output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        found.append(tokens)
    return found


@contextmanager
def engine(folder: Path, **options):
    """A vLLM engine in this process, of 128 tokens a step."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 26,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    found = LLM(str(folder), **(defaults | options))
    try:
        yield found
    finally:
        found.llm_engine.engine_core.shutdown()
        del found
        gc.collect()


def answers(llm, asked: list[list[int]] | None = None) -> list:
    """An engine's greedy answers, to all prompts at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": ids} for ids in asked or prompts()], sampling, use_tqdm=False)


def tokens(found: list) -> list[list[int]]:
    """The tokens of an engine's answers."""
    return [list(answer.outputs[0].token_ids) for answer in found]


def generate(llm, asked: list[list[int]] | None = None) -> list[list[int]]:
    """An engine's greedy tokens, of all prompts at once."""
    return tokens(answers(llm, asked))


def quantise_to_int8(folder: Path) -> int:
    """Round all linear layers of a model's folder to eight bits, as compressed-tensors stores them; their number."""
    path, config = folder / "model.safetensors", folder / "config.json"
    weights, rounded = load_file(path), {}
    for name, weight in weights.items():
        if name.endswith(("_proj.weight", ".gate.weight")):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            rounded[f"{name}_scale"] = scale
    save_file(weights | rounded, path, metadata={"format": "pt"})
    of_int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": of_int8 | {"strategy": "channel", "dynamic": False},
        "input_activations": of_int8 | {"strategy": "token", "dynamic": True},
    }
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": scheme}))
    return len(rounded)
