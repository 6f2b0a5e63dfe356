"""Train the bundled demo teacher: a small Qwen2 on the standard library's sources, with its own byte-level BPE.

    python tools/train_bundled_teacher.py --out src/radlads/assets/teacher

Held-out files (radlads.data.python_text) are never seen, by the tokenizer either. Prints the held-out bits per byte
beside those of `xz -9` and of an interpolated bigram model on the same text, and writes the three to figures.json.
"""

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from radlads.data.python_text import iter_documents

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from pretraining import autocast, build_optimizers, fast_tokenizer, qwen2_config, rate, update, windows
from python_corpus import train_tokenizer


def encode_split(tokenizer, split) -> tuple[np.ndarray, int]:
    """Token ids of a split, end-of-text after each document, and the number of UTF-8 bytes of its documents."""
    texts = [text for _, text in iter_documents(split)]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    ids = [np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int64) for encoding in encodings]
    return np.concatenate(ids), sum(len(text.encode()) for text in texts)


@torch.no_grad()
def heldout_nats(model, tokens: np.ndarray, *, context: int) -> float:
    """Summed negative log-likelihood of every token after the first, each seen with at least context/2 of context."""
    total, stride = 0.0, context // 2
    for start in range(0, len(tokens) - 1, stride):
        window = torch.from_numpy(tokens[start : start + context + 1])[None].to(model.device)
        with autocast(model.device.type):
            logits = model(window[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits.float(), window[0, 1:], reduction="none")
        total += losses[0 if start == 0 else context - stride :].sum().item()
    return total


def bigram_nats(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Summed nats of an interpolated bigram model (Witten-Bell smoothing onto add-one unigrams)."""
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    counts = np.zeros((vocab_size, vocab_size), dtype=np.float64)
    np.add.at(counts, (train[:-1], train[1:]), 1.0)
    total, distinct = counts.sum(1), (counts > 0).sum(1)
    first, second = heldout[:-1], heldout[1:]
    weight = distinct / np.maximum(total + distinct, 1)
    probability = counts[first, second] / np.maximum(total + distinct, 1)[first]
    probability += np.where(total[first] > 0, weight[first], 1.0) * unigram[second]
    return float(-np.log(probability).sum())


def train(args) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = (text for _, text in iter_documents("train"))
    tokenizer = fast_tokenizer(tokenizer_object=train_tokenizer(texts, args.vocab_size))
    train_ids, _ = encode_split(tokenizer, "train")
    heldout_ids, heldout_bytes = encode_split(tokenizer, "heldout")
    print(f"{len(train_ids):,} training tokens, {len(heldout_ids):,} held out ({heldout_bytes:,} bytes)", flush=True)

    config = qwen2_config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_layers=args.layers,
        head_size=64,
        rope_theta=1e4,
        end_of_text=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(model, args.lr)
    loss_of = torch.compile(next_token_loss, dynamic=False)
    began, step, tokens_seen = time.monotonic(), 0, 0
    long_from = 0.75  # short sequences first; the last quarter of the tokens is for long ones
    tokens_per_batch = args.batch * args.context
    batches = {
        length: windows(torch.from_numpy(train_ids).to(args.device), length, tokens_per_batch // length, args.seed)
        for length in (args.short, args.context)
    }
    while tokens_seen < args.tokens:
        done = tokens_seen / args.tokens
        share = rate(done, step, warmup_steps=100)
        batch = next(batches[args.short if done < long_from else args.context])
        loss = loss_of(model, batch)
        update(model, optimizers, loss, args.lr * share)
        step, tokens_seen = step + 1, tokens_seen + batch[:, 1:].numel()
        if step % 50 == 0:
            elapsed = time.monotonic() - began
            speed = tokens_seen / elapsed
            print(f"{elapsed:6.0f}s step {step} loss {loss.item():.4f} rate {share:.3f} {speed:,.0f} tok/s", flush=True)
        if step % 500 == 0:
            _report(model.eval(), heldout_ids[:40_000], heldout_bytes * 40_000 / len(heldout_ids), args.context)
            save(model, tokenizer, args.out)
            model.train()
    save(model, tokenizer, args.out)
    write_figures(args.out, train_ids, heldout_ids, heldout_bytes, tokens_seen, args.context)


def next_token_loss(model, batch):
    """Mean cross-entropy of [B, T + 1] token ids; bf16 matrix products on a GPU."""
    with autocast(batch.device.type):
        logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def save(model, tokenizer, out: Path) -> None:
    """Write weights in bf16, configuration and tokenizer."""
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)


def _report(model, ids, num_bytes, context) -> None:
    nats = heldout_nats(model, ids, context=context)
    print(f"    held out: {nats / len(ids):.4f} nats/token, {nats / math.log(2) / num_bytes:.4f} bits/byte", flush=True)


def write_figures(out: Path, train_ids, heldout_ids, heldout_bytes: int, tokens_seen: int, context: int) -> None:
    """Measure the saved teacher, `xz -9` and the bigram model on the held-out text and write figures.json."""
    model = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    text = "".join(text for _, text in iter_documents("heldout")).encode()
    to_bits = 1 / math.log(2) / heldout_bytes
    figures = {
        "teacher_bits_per_byte": heldout_nats(model, heldout_ids, context=context) * to_bits,
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / heldout_bytes,
        "bigram_bits_per_byte": bigram_nats(train_ids, heldout_ids, model.config.vocab_size) * to_bits,
        "heldout_bytes": heldout_bytes,
        "heldout_tokens": len(heldout_ids),
        "training_tokens_seen": tokens_seen,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, config, tokenizer and figures.json"
    )
    parser.add_argument("--tokens", type=int, default=14_100_000, help="training tokens; the rate decays to their end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=832)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="tokens per sequence at the end of training")
    parser.add_argument("--short", type=int, default=512, help="tokens per sequence before that")
    parser.add_argument("--batch", type=int, default=8, help="sequences of --context tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1337)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
