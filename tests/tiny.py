"""Tiny teachers, corpora and configurations for tests of conversion and training."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.data.binidx import BinIdxWriter

VOCAB = 260


def teacher_folder(folder: Path, *, tied: bool = False, vocab_size: int = VOCAB) -> Path:
    """A random Qwen2 (GQA 4:2, non-zero biases) with a byte-level tokenizer, as a Hugging Face folder."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=min(256, vocab_size - 1),
        eos_token_id=min(256, vocab_size - 1),
        pad_token_id=min(256, vocab_size - 1),
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return folder


def corpus(stem: Path, *, num_tokens: int = 20_000, seed: int = 0) -> Path:
    """A .bin/.idx pair of random walks over the byte vocabulary; returns its stem."""
    steps = np.random.default_rng(seed).integers(-3, 4, num_tokens)
    with BinIdxWriter(stem, VOCAB) as writer:
        for document in np.split(np.cumsum(steps) % 256, 20):
            writer.add_document(document)
    return stem


def stage_config(folder: Path, stage: str, **overrides: object) -> Config:
    """A stage's configuration on the corpus `folder/train`, fp32 on the CPU, 16 tokens of context."""
    number = {"align": 1, "distill": 2, "extend": -1}[stage]
    keys: dict[str, object] = {
        "model.ctx_len": 16,
        "model.tmix": "rad_rwkv7",
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        "train.attention_distillation_stage": number,
        "train.data_file": str(folder / "train"),
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.micro_bsz": 4,
        "train.lr_init": 1e-3,
        "train.my_exit_tokens": 16 * 4 * 5,
        "train.log_every_n_steps": 1,
        "train.proj_dir": str(folder),
    }
    return load_config([], keys | overrides)


class Silent:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, text: str) -> None:
        self.lines.append(text)
