"""A Qwen2 teacher trained from scratch on a token corpus, as a Hugging Face folder.

Owns the teacher's shape and its training. Weights are fp32, matrix products bf16 on CUDA; Muon for the layers'
matrices, AdamW for the rest. Most of the training is at a short context, the end at a long one.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretraining import autocast, build_optimizers, fast_tokenizer, qwen2_config, rate, update, windows
from transformers import Qwen2Config, Qwen2ForCausalLM

from radlads.checkpoint.atomic import unfinished_folder
from radlads.data.binidx import BinIdxReader

FACTS = "training.json"
_WARMUP_STEPS = 60
_REPORT_EVERY_S = 10


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """Shape and training. tokens: the budget, or 0 to train for `seconds`, compiling included.

    key_value_heads: 0 = half the heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    head_size: int
    context: int
    long_context: int
    long_share: float
    batch_tokens: int
    seconds: float
    tokens: int
    lr: float
    seed: int
    compile: bool
    key_value_heads: int = 0


def train_teacher(
    plan: TeacherPlan,
    corpus: BinIdxReader,
    tokenizer_file: Path,
    folder: Path,
    device: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train and write the teacher's folder and return its facts; a finished folder is kept.

    Raises ValueError for a loss that is not finite.
    """
    if folder.exists():
        tell(f"teacher: kept what is in {folder}")
        return json.loads((folder / FACTS).read_text())
    began = time.monotonic()
    torch.manual_seed(plan.seed)
    tokenizer = fast_tokenizer(tokenizer_file=str(tokenizer_file))
    model = Qwen2ForCausalLM(_config(plan, tokenizer.eos_token_id)).to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tell(f"teacher: {num_parameters:,} parameters")
    tokens = torch.from_numpy(corpus.tokens.astype("int32")).to(device)
    batches = {
        length: windows(tokens, length, max(1, plan.batch_tokens // length), plan.seed)
        for length in (plan.context, plan.long_context)
    }
    was_compiled = prepare(model, plan, {length: next(each) for length, each in batches.items()}, tell)
    facts = _train(model, plan, batches, began, tell)
    facts |= {"parameters": num_parameters, "compiled": was_compiled, "corpus_epochs": facts["tokens"] / len(tokens)}
    with unfinished_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts["seconds"] = time.monotonic() - began
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _config(plan: TeacherPlan, end_of_text: int) -> Qwen2Config:
    """The plan's shape with Qwen2.5's RoPE base."""
    return qwen2_config(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_layers=plan.num_layers,
        head_size=plan.head_size,
        rope_theta=1e6,
        end_of_text=end_of_text,
        key_value_heads=plan.key_value_heads,
    )


def prepare(model, plan: TeacherPlan, samples: dict[int, torch.Tensor], tell: Callable[[str], None]) -> bool:
    """Compile the layers, one graph for all of them, and try every batch shape; True if the model is compiled now.

    Where compiling raises, the model trains as it is.
    """
    if not plan.compile:
        return False
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        for length, batch in samples.items():
            began = time.monotonic()
            next_token_loss(model, batch).backward()
            tell(f"teacher: compiled for sequences of {length} in {time.monotonic() - began:.0f} s")
    except RuntimeError as error:  # all of the compiler's own errors are
        tell(f"teacher: not compiled, because {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        for layer in model.model.layers:
            del layer.forward
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def next_token_loss(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of [B, T + 1] token ids."""
    with autocast(batch.device.type):
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _train(
    model, plan: TeacherPlan, batches: dict[int, Iterator[torch.Tensor]], began: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    optimizers = build_optimizers(model, plan.lr)
    started = reported = time.monotonic()
    available_s = max(1.0, plan.seconds - (started - began))
    step = tokens_seen = long_tokens = 0
    loss = torch.tensor(math.nan)
    while True:
        now = time.monotonic()
        done = tokens_seen / plan.tokens if plan.tokens else (now - started) / available_s
        if done >= 1:
            break
        length = plan.long_context if done >= 1 - plan.long_share else plan.context
        batch = next(batches[length])
        loss = next_token_loss(model, batch)
        update(model, optimizers, loss, plan.lr * rate(done, step, warmup_steps=_WARMUP_STEPS))
        step, tokens_seen = step + 1, tokens_seen + batch[:, 1:].numel()
        long_tokens += batch[:, 1:].numel() if length == plan.long_context else 0
        # Also keeps the host from running ahead of the device, by whose clock the training ends
        if step % 10 == 0 and not math.isfinite(loss.item()):
            raise ValueError(f"the teacher's loss is {loss.item()} at step {step}: lower --teacher-lr")
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            speed = tokens_seen / (now - started)
            tell(f"teacher: {done:4.0%} step {step} loss {loss.item():.4f} {speed:,.0f} tok/s, sequences of {length}")
    return {
        "tokens": tokens_seen,
        "long_tokens": long_tokens,
        "steps": step,
        "last_loss": loss.item(),
        "training_s": time.monotonic() - started,
    }
