"""Tiny GGUF files, written as llama.cpp's converter writes them, from transformers' own models."""

from pathlib import Path

import numpy as np
import tiny
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model(architecture: str, *, tied: bool = False) -> PreTrainedModel:
    """A random model of 3 layers, 64 channels, 4 heads over 2."""
    torch.manual_seed(3)
    config = CONFIGS[architecture](
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32 if architecture == "qwen3" else 16,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    made = AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def tensors(source: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's parameters under GGUF's names, a Llama's queries and keys in its order of channels."""
    found = {}
    for name, parameter in source.named_parameters():
        stem, kind = name.rsplit(".", 1)
        values = parameter.detach().numpy()
        if stem in _WHOLE:
            found[f"{_WHOLE[stem]}.{kind}"] = values
            continue
        _, _, layer, part = stem.split(".", 3)
        if source.config.model_type == "llama" and _NAMES[part] in ("attn_q", "attn_k"):
            config = source.config
            heads = config.num_attention_heads if _NAMES[part] == "attn_q" else config.num_key_value_heads
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        found[f"blk.{layer}.{_NAMES[part]}.{kind}"] = values
    return found


def write(
    file: Path,
    source: PreTrainedModel,
    *,
    quantised: GGMLQuantizationType | None = None,
    architecture: str | None = None,
    more: dict[str, float] | None = None,
    without: str = "",
    extra: str = "",
    aligned: int = 32,
    part: tuple[int, int] = (1, 1),
) -> Path:
    """Write the model as a GGUF file. quantised: the type of its matrices. architecture: another name than its own.
    more: further numbers by key. without: a tensor to leave out. extra: one to add. aligned: bytes that tensors begin
    at multiples of. part: this part of so many, tensors shared in turn."""
    config, name = source.config, architecture or source.config.model_type
    writer = GGUFWriter(file, name)
    writer.add_custom_alignment(aligned)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    _add_tokenizer(writer)
    for key, value in (more or {}).items():
        writer.add_float32(key, value)
    number, count = part
    for place, (tensor, values) in enumerate(tensors(source).items()):
        if tensor != without and place % count == number - 1:
            _add_tensor(writer, tensor, values, quantised)
    if extra:
        _add_tensor(writer, extra, np.ones(64), None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: GGUFWriter) -> None:
    """Bytes as tokens, 256 ends a text, 257 a turn; the template names roles."""
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "<|turn|>", "<|a|>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(texts)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    writer.add_eot_token_id(257)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")


def _add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType | None) -> None:
    if kind is None or values.ndim < 2:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
