"""The folder of a finished conversion, made of small files: for tests of what is told of a run."""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import stage_config

from radlads.config.load import dump_config

STAGES = ("align", "distill", "extend")
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SUMMARY = {
    "teacher": {"loss": 2.0123, "kl": 0.0, "top1": 1.0},
    "setup": {"loss": 5.5, "kl": 3.1, "top1": 0.111},
    "align": {"loss": 2.75, "kl": 0.5, "top1": 0.555},
    "distill": {"loss": 2.375, "kl": 0.25, "top1": 0.666},
    "extend": {"loss": 2.25, "kl": 0.3, "top1": 0.777},
    "gap_closed": 0.9318,
    "decode_ms": {"student": {"100": 2.5, "8000": 2.44}, "teacher": {"100": 1.41, "8000": 4.83}},
    "bytes": {"student": {"1024": 262144, "65536": 262144}, "teacher": {"1024": 2097152, "65536": 134217728}},
    "sample": {"prompt": "def main():", "student": "<script>alert('student')</script>", "teacher": "return 0 & 1"},
    "reload_max_abs_diff": 0.0,
    "peak_rss_gb": 1.25,
}


def run_folder(folder: Path) -> Path:
    """Three stages, an export's configuration, summary.json, eval.json and longcontext/longcontext.json."""
    for number, stage in enumerate(STAGES, start=1):
        stage_folder(folder / f"{number}-{stage}", stage)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    (folder / "longcontext").mkdir()
    (folder / "longcontext" / "longcontext.json").write_text(json.dumps(long_context()))
    return folder


def stage_folder(folder: Path, stage: str) -> Path:
    """A finished stage with hardly any weights."""
    folder.mkdir(parents=True)
    config = stage_config(folder, stage, **{"train.teacher.hf_path": "Qwen/Some-Teacher"})
    (folder / "config.yaml").write_text(dump_config(config))
    model = {"time_mixers": ["rad_rwkv7"] * 2, "vocab_size": 260, "balance_state": True, **SIZES}
    (folder / "config.json").write_text(json.dumps(model))
    rows = [f"{1000 * i},{1 / i},{0.5 / i},{0.7 / i}" for i in range(1, 30)]
    (folder / "metrics.csv").write_text("\n".join(["tokens,loss,layer_0,layer_1", *rows, "29000,,,"]) + "\n")
    (folder / "heldout.csv").write_text("step,tokens,loss,kl,top1,heldout_tokens\n0,0,4,1,0.3,64\n9,29000,3.125,,,64\n")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model.safetensors")
    manifest = {
        "stage": stage,
        "parent": "setup of Some-Teacher",
        "tokens": 29000,
        "seconds": 58.0,
        "heldout": {"loss": 3.125, "kl": 0.4375, "top1": 0.5},
        "versions": {"radlads": "9.9.9", "torch": "2.13.0"},
        "sha256": {"model.safetensors": "abc123"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def evaluation() -> dict:
    """What radlads eval --output writes, in brief."""
    shared = {"metric": "acc", "num_questions": 400, "stderr": 0.02, "chance": 0.25}
    values = {"teacher": (0.75, None), "hf": (0.65, 0.8)}
    scores = [
        {"task": task, "model": model, "value": value, "relative": relative, **shared}
        for task in ("piqa", "a_task_of_a_rather_long_name")
        for model, (value, relative) in values.items()
    ]
    perplexity = {"task": "wikitext", "metric": "perplexity", "num_questions": 62, "stderr": None, "chance": None}
    scores += [{"model": model, "value": 12.3456, "relative": None, **perplexity} for model in values]
    return {"scores": scores}


def long_context() -> dict:
    """What radlads longcontext writes."""
    lengths = [1024, 2048, 4096, 8192]

    def model(factor: float) -> dict:
        cells = [
            {"length_tokens": length, "depth": depth, "num_right": round(60 * factor * depth), "num_samples": 60}
            for length in lengths
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        edges = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
        bins = [
            {"first": first, "end": end, "loss": 4 - 0.2 * factor * i, "num_tokens": 4 * (end - first)}
            for i, (first, end) in enumerate(itertools.pairwise(edges))
        ]
        costs = [
            {"context_tokens": n, "prefill_tokens_per_s": 900 * factor, "decode_ms": 2 / factor}
            | {"state_bytes": 256 * n, "peak_bytes": 900 * n}
            for n in lengths
        ]
        return {"passkey": cells, "needle": cells, "loss": bins, "costs": costs}

    tasks = {"passkey": {"digits": 5}, "needle": {"digits": 7}}
    settings = {"num_samples": 60, "seed": 11, "text": "a book", "device": "cpu, 1 threads", "dtype": "float32"}
    return {"settings": settings | {"tasks": tasks}, "models": {"student": model(0.8), "teacher": model(1.0)}}
