"""A program for tests: `stages.py SPEC.json` trains the stages that SPEC lists, one after the other, in its processes.

Each entry has the configuration's `files` and dotted `keys`, which override those of the files, and `kill`, `stop` or
`raises`, [rank, step]: where a process sends itself SIGKILL or SIGTERM ("before": just before the first step), or
raises a user's error. Stopped with `goes_on`, or where it `fails` by a sentence, the next entry follows all the same.
`absent` in the first is the local rank that never joins. With `deepspeed_on_cpu` DeepSpeed's strategies run on CPUs.
With `nodes` in place of devices the caller starts a program for each node.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiny
import torch

from radlads.config.load import load_config
from radlads.console import Silent
from radlads.data.binidx import BinIdxWriter
from radlads.recipes.single_stage import train_stage
from radlads.train.checkpointing import Checkpointing
from radlads.train.engines import replicas
from radlads.train.lightning_module import StageModule
from radlads.train.processes.joining import joined

END, STEPS = 255, 16
LINEAR = torch.nn.functional.linear
STEP_AS_EVER, START_AS_EVER = StageModule.training_step, Checkpointing.on_train_start
replicas.LARGE_NUMBERS = 1000  # or every gradient of a tiny model would travel with the others, at the end


class Printing(Silent):
    def line(self, text: str) -> None:
        print(text, flush=True)


def main(spec: Path) -> int:
    entries = json.loads(spec.read_text())
    if entries[0].get("absent") == int(os.environ.get("LOCAL_RANK", 0)):
        return 3
    configs = [load_config(entry.get("files", []), entry["keys"]) for entry in entries]
    if any(entry.get("deepspeed_on_cpu") for entry in entries):
        import deepspeed_on_cpu

        deepspeed_on_cpu.allow_cpus()
    try:
        with joined(configs[0].train) as processes:
            for entry, config in zip(entries, configs, strict=True):
                plan(entry, processes.rank)
                try:
                    train_stage(config, Printing() if processes.is_first else Silent(), processes)
                except SystemExit as stopped:
                    if not (entry.get("goes_on") and stopped.code == 128 + signal.SIGTERM):
                        raise
                except ValueError as error:
                    if not entry.get("fails"):
                        raise
                    print(f"radlads: {error}", file=sys.stderr, flush=True)
                else:
                    assert not entry.get("goes_on") and not entry.get("fails"), "it came to its end"
                finally:
                    assert torch.nn.functional.linear is LINEAR, "DeepSpeed's is still in its place"
    except (ValueError, OSError) as error:
        print(f"radlads: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def plan(entry: dict, rank: int) -> None:
    """Have this process end amid the stage, if the entry says so."""

    def step(self, *batch):
        if entry.get("kill") == [rank, self.steps_done]:
            os.kill(os.getpid(), signal.SIGKILL)
        if entry.get("raises") == [rank, self.steps_done]:
            raise ValueError("a user's error")
        if entry.get("stop") == [rank, self.steps_done]:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP_AS_EVER(self, *batch)

    def begin(self, *arguments):
        if entry.get("stop") == [rank, "before"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return START_AS_EVER(self, *arguments)

    StageModule.training_step, Checkpointing.on_train_start = step, begin


def keys(
    folder: Path, teacher: Path, stage: str, name: str, *, mixer: str = "rad_rwkv7", **train: object
) -> dict[str, object]:
    """A tiny stage's dotted keys: STEPS steps of 8 sequences of 16 tokens, as two processes of 4 make them."""
    own = {
        "model.ctx_len": 16,
        "model.tmix": mixer,
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        "train.attention_distillation_stage": {"align": 1, "distill": 2, "extend": -1, "instruct": 4}[stage],
        "train.data_file": str(folder / ("chat" if stage == "instruct" else "train")),
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.micro_bsz": 4,
        "train.devices": 2,
        "train.lr_init": 1e-3,
        "train.my_exit_tokens": 16 * 8 * STEPS,
        "train.log_every_n_steps": 1,
        "train.proj_dir": str(folder),
        "train.proj_name": name,
    }
    if stage != "extend":
        own["train.teacher.hf_path"] = str(teacher)
    return own | {f"train.{key}": value for key, value in train.items()}


def corpus(folder: Path) -> Path:
    """Random walks in documents of 2 to 60 tokens, each with END at its end, as `folder`/train; conversations as
    `folder`/chat."""
    tiny.chat_corpus(folder / "chat", num_documents=200, end=END)
    random = np.random.default_rng(0)
    with BinIdxWriter(folder / "train", tiny.VOCAB) as writer:
        for length in random.integers(1, 60, 700):
            walk = np.cumsum(random.integers(-3, 4, length)) % (END - 1)
            writer.add_document(np.append(walk, END))
    return folder


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
