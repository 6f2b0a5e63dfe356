"""Proof that an exported folder stands alone: its logits in a process that cannot import radlads."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from radlads.model.modeling import RadladsForCausalLM

_SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "radlads":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, tokens, dtype, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
with torch.inference_mode():
    logits = model(torch.tensor([[int(token) for token in tokens.split(",")]])).logits
save_file({"logits": logits.float().contiguous()}, out)
"""


def reload_max_abs_diff(model: RadladsForCausalLM, folder: Path, token_ids: list[int]) -> float:
    """Largest difference between the logits of `model` and those of its export, in the model's type of numbers.
    Raises ValueError as reloaded_logits."""
    reloaded = reloaded_logits(folder, token_ids, model.dtype)
    return (logits_of(model, token_ids) - reloaded).abs().max().item()


def logits_of(model: RadladsForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Logits of one sequence, fp32 [1, T, V]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits.float()


def reloaded_logits(folder: Path, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits, fp32 [1, T, V], of a folder that is loaded in `dtype` with trust_remote_code=True, in a fresh process
    where radlads cannot be imported. Raises ValueError if the folder does not load there."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": scratch,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        arguments = [str(folder), ",".join(map(str, token_ids)), str(dtype).removeprefix("torch."), str(out)]
        command = [sys.executable, "-I", "-c", _SCRIPT, *arguments]
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"{folder} does not load on its own: {reason}")
        return load_file(out)["logits"]
