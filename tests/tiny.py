"""Tiny teachers, corpora and configurations for tests of conversion and training."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

from radlads.checkpoint.hf_export import export
from radlads.checksums import CHECKSUMS
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.data.binidx import BinIdxWriter
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.optimizers.optim import build_optimizers
from radlads.train.optimizers.step import optimizer_step

VOCAB = 260


def teacher_folder(folder: Path, *, tied: bool = False, vocab_size: int = VOCAB, heads: int = 4) -> Path:
    """A random Qwen2 (64 channels, GQA of two heads, non-zero biases) with a byte-level tokenizer, as a Hugging Face
    folder."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=(heads + 1) // 2,
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
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer's files; 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )


def moved_student(teacher: Path, folder: Path) -> RadladsForCausalLM:
    """A student of the teacher, every parameter moved from where setup leaves it; folder: for what is not its own."""
    torch.manual_seed(0)
    student, _ = build_student(open_teacher(teacher), stage_config(folder, "align").model)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


def changeable_export(teacher: Path, folder: Path) -> Path:
    """An export of a student of the teacher without its checksums, as whoever changes a folder can leave it."""
    export(moved_student(teacher, folder).eval(), teacher, folder / "model")
    (folder / "model" / CHECKSUMS).unlink()
    return folder / "model"


def endless_export(teacher: Path, folder: Path, template: str) -> Path:
    """An export with this chat template, whose greedy texts do not end by themselves."""
    student = moved_student(teacher, folder)
    student.lm_head.weight.data[256] = 0
    export(student, teacher, folder / "hf")
    (folder / "hf" / "chat_template.jinja").write_text(template)
    return folder / "hf"


def losses_by(optimizer: str, teacher: Path, folder: Path, place: torch.Tensor) -> list[float]:
    """A student's losses on the same tokens in 12 steps of an optimiser, on the device and in the type of `place`."""
    config = stage_config(folder, "distill", **{"train.optimizer": optimizer, "train.lr_init": 1e-3})
    torch.manual_seed(0)
    student = build_student(open_teacher(teacher), config.model)[0].to(place).train()
    optimizers = build_optimizers(student, config.train)
    tokens = (torch.arange(80, device=place.device).view(2, 40) * 7) % VOCAB
    losses = []
    for _ in range(12):
        loss = student(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer_step(optimizers, student.parameters(), count=1, clip_val=1.0)
        losses.append(loss.item())
    return losses


def put_bos_first(folder: Path) -> int:
    """Have a folder's tokenizer begin every text with <|begin|>, as Llama 3's does; that token's id."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin|>"])
    bos = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|begin|>"}))
    return bos


def corpus(stem: Path, *, num_tokens: int = 20_000, seed: int = 0) -> Path:
    """A .bin/.idx pair of random walks over the byte vocabulary; returns its stem."""
    steps = np.random.default_rng(seed).integers(-3, 4, num_tokens)
    with BinIdxWriter(stem, VOCAB) as writer:
        for document in np.split(np.cumsum(steps) % 256, 20):
            writer.add_document(document)
    return stem


def chat_corpus(stem: Path, *, num_documents: int = 60, end: int = 256, seed: int = 0) -> Path:
    """A corpus of conversations with a mask: one or two questions of bytes, each with a reply that `end` ends."""
    draw = np.random.default_rng(seed)
    with BinIdxWriter(stem, VOCAB, masked=True) as writer:
        for _ in range(num_documents):
            ids: list[int] = []
            mask: list[bool] = []
            for _ in range(int(draw.integers(1, 3))):
                asked, said = (draw.integers(0, 200, int(draw.integers(2, 5))).tolist() for _ in range(2))
                ids += [*asked, *said, end]
                mask += [False] * len(asked) + [True] * (len(said) + 1)
            writer.add_document(ids, mask)
    return stem


def stage_config(folder: Path, stage: str, **overrides: object) -> Config:
    """A stage's configuration on the corpus `folder/train`, or `folder/chat` to instruct, fp32 on the CPU, 16 tokens of
    context."""
    number = {"align": 1, "distill": 2, "extend": -1, "instruct": 4}[stage]
    keys: dict[str, object] = {
        "model.ctx_len": 16,
        "model.tmix": "rad_rwkv7",
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        "train.attention_distillation_stage": number,
        "train.data_file": str(folder / ("chat" if stage == "instruct" else "train")),
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.micro_bsz": 4,
        "train.lr_init": 1e-3,
        "train.my_exit_tokens": 16 * 4 * 5,
        "train.log_every_n_steps": 1,
        "train.proj_dir": str(folder),
    }
    return load_config([], keys | overrides)


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
# Contexts of a few tokens, so that the scalings change what tests of a few dozen tokens see
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}
# GQA 4:2 all; Qwen3 with heads * head_dim = 96, not 64
FAMILIES = {
    "qwen3": Qwen3Config(**SIZES, head_dim=24, rope_parameters=PLAIN_ROPE),
    "qwen3-yarn": Qwen3Config(**SIZES, head_dim=24, rope_parameters=YARN_ROPE),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-plain": LlamaConfig(**SIZES, rope_parameters=PLAIN_ROPE),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN_ROPE),
    "qwen2-linear": Qwen2Config(**SIZES, rope_parameters=LINEAR_ROPE),
}


def family_folder(folder: Path, family: str, *, tied: bool = False) -> Path:
    """A random model of one of FAMILIES, its norms and biases moved, with a tokenizer, as a Hugging Face folder."""
    torch.manual_seed(7)
    config = copy.deepcopy(FAMILIES[family])
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


class Silent:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, text: str) -> None:
        self.lines.append(text)
