"""A program for tests: `memory.py FOLDER STRATEGY` builds the student of FOLDER/teacher over two processes.

It is saved as FOLDER/STRATEGY; FOLDER/STRATEGY-RANK.json says what each process held at most, in bytes over what it
held before, and what a model in FSDP2's shards computes.
"""

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import stages
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from radlads.checkpoint.model_folder import save_model, take_part_in_saving
from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import student_blueprint
from radlads.train.engines.sharding import is_sharded, settle
from radlads.train.placement import build_models
from radlads.train.processes.joining import joined

SHARD_BYTES = 50_000_000


def save_teacher(folder: Path) -> None:
    """A teacher of 0.25 GB in fp32, whose largest tensor is 17 MB."""
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="50MB")


def held_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Most:
    """The most that was held while its block lasted, over what was held before."""

    def __enter__(self):
        self._before, self._over = held_bytes(), threading.Event()
        self.num_bytes = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self):
        while not self._over.is_set():
            self.num_bytes = max(self.num_bytes, held_bytes() - self._before)
            time.sleep(0.002)

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()


def main(folder: Path, strategy: str) -> None:
    keys = stages.keys(folder, folder / "teacher", "distill", "unused", strategy=strategy)
    if strategy != "fsdp":
        import deepspeed_on_cpu

        deepspeed_on_cpu.allow_cpus()
    config = load_config([], keys)
    with joined(config.train) as processes:
        blueprint = student_blueprint(open_teacher(folder / "teacher"), config.model)
        with Most() as building:
            student = build_models(config, blueprint, None, processes).student
        logits = []
        if is_sharded(student):
            settle(student)
            with torch.no_grad():
                logits = student(torch.arange(64).view(2, 32), use_cache=False).logits[0, -1, :8].tolist()
        with Most() as saving:
            if processes.is_first:
                (folder / strategy).mkdir()
                save_model(student, folder / strategy, shard_bytes=SHARD_BYTES)
            else:
                take_part_in_saving(student, shard_bytes=SHARD_BYTES)
        found = {"building": building.num_bytes, "saving": saving.num_bytes, "logits": logits}
        (folder / f"{strategy}-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
