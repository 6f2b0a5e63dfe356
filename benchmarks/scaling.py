"""How a training stage scales: `radlads train` on one device and on several, at random weights of a Qwen2.5 size.

    python benchmarks/scaling.py --size 0.5b --devices 2 --strategies ddp,fsdp --json scaling.json

For every stage: one device with M sequences a step, one with N times M, and N devices with M each by every strategy.
Efficiency is the tokens per second of N devices over N times those of the first; drift compares the loss and the
gradient's norm, step by step, with the second's, which makes the same steps. Speeds are medians over the second half of
the steps, which leaves compiling out. `--size tiny --accelerator cpu` shows how it goes, in minutes and without a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from radlads.checkpoint.model_folder import save_model
from radlads.config.schema import ModelConfig
from radlads.convert.hf_source import open_teacher
from radlads.convert.shapes import QWEN25
from radlads.convert.student import build_student
from radlads.data.binidx import BinIdxWriter
from radlads.report.run_folder import read_csv

TINY = (2, 128, 256, 4, 2, 512, False)
STAGES = {"align": 1, "distill": 2}
ROW_STEPS = 5
STUDENT: dict[str, Any] = {"tmix": "rad_rwkv7", "groupnorm_att": 0, "gate_rank_type": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b", choices=["tiny", *QWEN25])
    parser.add_argument("--layers", type=int, help="so many of the size's layers")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--strategies", default="ddp,fsdp")
    parser.add_argument("--stages", default="align,distill")
    parser.add_argument("--sequences", type=int, default=12, help="M, of each device")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which a run is given up")
    parser.add_argument("--no-curves", action="store_true", help="leave out the run that curves are compared with")
    parser.add_argument("--again", action="store_true", help="run the one device once more at the end")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a configuration key, any times"
    )
    parser.add_argument("--json", type=Path, help="where figures go, as soon as they are there")
    arguments = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        runs = Runs(arguments, Path(name))
        for stage in arguments.stages.split(","):
            for figure in runs.of(stage):
                figures.append(figure)
                print(row(figure), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any("failed" in figure for figure in figures))


class Runs:
    """The runs of one model, whose files are in `folder`. All begin with the student as setup leaves it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder = arguments, folder
        layers, channels, inner, heads, kv_heads, vocabulary, tied = QWEN25.get(arguments.size, TINY)
        layers = arguments.layers or layers
        save_teacher(folder / "teacher", layers, channels, inner, heads, kv_heads, vocabulary, tied=tied)
        save_corpus(folder / "corpus", vocabulary)
        (folder / "student").mkdir()
        save_model(build_student(open_teacher(folder / "teacher"), ModelConfig(**STUDENT))[0], folder / "student")

    def of(self, stage: str) -> Iterator[dict[str, Any]]:
        """A figure for each run of a stage."""
        wanted, devices, sequences = self.arguments, self.arguments.devices, self.arguments.sequences
        alone = self.run(stage, "alone", devices=1, sequences=sequences)
        yield alone
        whole: dict[str, Any] = {"failed": "left out"}
        if not wanted.no_curves:
            whole = self.run(stage, "whole", devices=1, sequences=sequences, accumulate=devices)
            yield whole
        for strategy in filter(None, wanted.strategies.split(",")):
            found = self.run(stage, strategy, devices=devices, sequences=sequences)
            if "failed" not in found and "failed" not in alone:
                found["efficiency"] = found["tokens_per_s"] / (devices * alone["tokens_per_s"])
            if "failed" not in found and "failed" not in whole:
                found |= {f"{key}_drift": drift(found[key], whole[key]) for key in ("loss", "grad_norm")}
            yield found
        if wanted.again:
            yield self.run(stage, "again", devices=1, sequences=sequences)

    def run(self, stage: str, name: str, *, devices: int, sequences: int, accumulate: int = 1) -> dict[str, Any]:
        """One run: speed, memory, and the curves."""
        wanted, context = self.arguments, self.arguments.context
        tokens = wanted.steps * sequences * devices * accumulate * context
        keys = {
            "attention_distillation_stage": STAGES[stage],
            "teacher.hf_path": self.folder / "teacher",
            "data_file": self.folder / "corpus",
            "proj_dir": self.folder,
            "proj_name": f"{stage}-{name}",
            "load_model": self.folder / "student",
            "accelerator": wanted.accelerator,
            "precision": wanted.precision,
            "strategy": name if devices > 1 else "auto",
            "devices": devices,
            "micro_bsz": sequences,
            "accumulate_grad_batches": accumulate,
            "my_exit_tokens": tokens,
            "log_every_n_steps": ROW_STEPS,
            "lr_init": 1e-3 if stage == "align" else 1e-5,
            "beta2": 0.95,
        }
        model = STUDENT | {"ctx_len": context}
        options = [f"--train.{key}={value}" for key, value in keys.items()]
        options += [f"--model.{key}={value}" for key, value in model.items()]
        options += [f"--{each}" for each in wanted.set]
        figure: dict[str, Any] = {"stage": stage, "run": name, "devices": devices, "sequences": sequences * accumulate}
        began = time.monotonic()
        command = [sys.executable, "-m", "radlads.cli", "train", *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=wanted.seconds)
        except subprocess.TimeoutExpired as stopped:
            said = b"".join(each for each in (stopped.stdout, stopped.stderr) if isinstance(each, bytes))
            said = said.decode(errors="replace")
            return figure | {"failed": f"not done after {wanted.seconds:.0f} s: {said[-500:]}"}
        if done.returncode:
            return figure | {"failed": (done.stderr.strip() or done.stdout.strip())[-2000:]}
        out = self.folder / f"{stage}-{name}"
        speed, metrics = read_csv(out / "speed.csv"), read_csv(out / "metrics.csv")
        later = speed[len(speed) // 2 :]
        peaks = [row["peak_memory_gb"] for row in later if "peak_memory_gb" in row]
        return figure | {
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in later),
            "peak_memory_gb": max(peaks, default=None),
            "mfu": statistics.median(row.get("mfu", float("nan")) for row in later),
            "loss": [row["loss"] for row in metrics],
            "grad_norm": [row["grad_norm"] for row in metrics],
            "seconds": time.monotonic() - began,
        }


def save_teacher(
    folder: Path, layers: int, channels: int, inner: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool
) -> None:
    """A Qwen2 of these sizes with random weights, in bf16."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=channels,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def save_corpus(stem: Path, vocabulary: int, num_tokens: int = 4_000_000) -> None:
    """Random walks over the vocabulary: something can be learnt of them."""
    steps = np.random.default_rng(0).integers(-3, 4, num_tokens)
    with BinIdxWriter(stem, vocabulary) as writer:
        for document in np.split(np.cumsum(steps) % vocabulary, 100):
            writer.add_document(document)


def drift(found: list[float], expected: list[float]) -> dict[str, float]:
    """Relative differences over the steps."""
    each = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    return {"max": max(each), "mean": statistics.fmean(each)}


def row(figure: dict[str, Any]) -> str:
    head = f"{figure['stage']:8}{figure['run']:18}{figure['devices']} x {figure['sequences']:<4}"
    if "failed" in figure:
        return f"{head}failed: {figure['failed']}"
    text = f"{head}{figure['tokens_per_s']:12,.0f} tok/s  mfu {figure['mfu']:.3f}  peak {figure['peak_memory_gb']} GB"
    if "efficiency" in figure:
        text += f"  efficiency {figure['efficiency']:.3f}"
    for key in ("loss", "grad_norm"):
        if f"{key}_drift" in figure:
            text += f"  {key} drift max {figure[f'{key}_drift']['max']:.1e} mean {figure[f'{key}_drift']['mean']:.1e}"
    return f"{text}  ({figure['seconds']:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
