"""Training a small Qwen2 from scratch: its shape and tokenizer, batches, optimisers and schedule.

What python_teacher.py and tools/train_bundled_teacher.py share; each has a loop of its own around it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from python_corpus import END_OF_TEXT
from transformers import PreTrainedTokenizerFast, Qwen2Config


def fast_tokenizer(**source: Any) -> PreTrainedTokenizerFast:
    """A trained tokenizer, given as tokenizer_file or tokenizer_object, with end-of-text as eos and padding."""
    return PreTrainedTokenizerFast(
        **source, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def qwen2_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    head_size: int,
    rope_theta: float,
    end_of_text: int,
    key_value_heads: int = 0,
) -> Qwen2Config:
    """A Qwen2 with an untied head, and with half as many key-value heads as heads unless their number is given."""
    heads = hidden_size // head_size
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads // 2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def windows(tokens: torch.Tensor, length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [rows, length + 1] for ever, on the tokens' device: every epoch a new offset and order of windows.

    Raises ValueError for fewer tokens than a batch takes at any offset.
    """
    generator = torch.Generator().manual_seed(seed + length)
    steps = torch.arange(length + 1, device=tokens.device)
    if len(tokens) < (rows + 1) * length + 1:
        raise ValueError(f"a corpus of {len(tokens)} tokens is too short for batches of {rows} x {length}")
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        order = torch.randperm((len(tokens) - offset - 1) // length, generator=generator)
        for chunk in order.split(rows):
            if len(chunk) == rows:
                starts = (offset + chunk * length).to(tokens.device)
                yield tokens[starts[:, None] + steps].long()


def build_optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head and vectors."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def rate(done: float, step: int, *, warmup_steps: int) -> float:
    """Share of the full learning rate: warm-up by steps, flat for 30 % of the training, then linearly to 1 %."""
    return min(1.0, (step + 1) / warmup_steps) * min(1.0, max(0.01, (1 - done) / 0.7))


def update(model, optimizers: Sequence[torch.optim.Optimizer], loss: torch.Tensor, lr: float) -> None:
    """One step down the loss's gradient, clipped to a norm of 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def autocast(device_type: str) -> AbstractContextManager:
    """bf16 matrix products on CUDA, fp32 elsewhere."""
    return torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda")
