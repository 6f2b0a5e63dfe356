"""transformers' Auto classes open an export in a process that has neither radlads nor the mixers' own files."""

import os
import subprocess
import sys

import documented_mixers
import pytest
import tiny
import torch

from radlads.checkpoint.hf_export import export
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

PROMPT = [64, 65, 66, 67, 68]  # abcde
PROGRAM = """
import importlib.util, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("radlads", "tmix", "cmix"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

folder, order = sys.argv[1:]
if order == "config first":
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.time_mixers == model.config.time_mixers
ids = tokenizer("abcde", return_tensors="pt").input_ids
kept = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "suppress_tokens": None}
print(*model.generate(ids, **kept)[0].tolist())
print(*model.generate(ids, use_cache=False, **kept)[0].tolist())
print(model.config.layer_types, *sorted({type(block.self_attn).__name__ for block in model.model.layers}))
"""
STACKS = {
    "ours": (["rad_rwkv7", "qwen2", "rad_rwkv6"], "['linear_attention', 'full_attention', 'linear_attention']"),
    "windowed": (["rad_rwkv7", "rad_rwkv6", "rad_rwkv7"], f"{['linear_attention'] * 3}"),
    "own": (["mean", "leaky", "leaky"], "['linear_attention', 'linear_attention', 'linear_attention']"),
}
CLASSES = {"ours": ["RadRwkv6", "RadRwkv7", "SoftmaxAttention"], "own": ["TMix_leaky", "TMix_mean"]}
CLASSES["windowed"] = ["RadRwkv6", "RadRwkv7"]
WINDOWS = {f"rad_rwkv{n}": {"window_tokens": 3, "sink_tokens": 1} for n in (6, 7)}


@pytest.fixture(scope="module")
def exports(teacher, tmp_path_factory):
    """The folders of both models, and what each generates here."""
    folder = tmp_path_factory.mktemp("exports")
    file = documented_mixers.write_mixers(folder / "mixers") / "tmix" / "tmix_mean.py"
    # Which is being imported when the mixers are
    file.write_text(f"from radlads.model.configuration import RadladsConfig\n{file.read_text()}")
    found = {}
    with documented_mixers.known(folder / "mixers"):
        for name, (mixers, _) in STACKS.items():
            torch.manual_seed(0)
            settings = WINDOWS if name == "windowed" else {}
            config = RadladsConfig(**tiny.SIZES, time_mixers=mixers, mixer_settings=settings)
            model = RadladsForCausalLM(config).eval()
            for parameter in model.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            export(model, teacher, folder / name)
            ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, num_beams=2)
            found[name] = folder / name, ids[0].tolist()
    return found


@pytest.mark.parametrize("order", ["config first", "model first"])
@pytest.mark.parametrize("name", STACKS)
def test_auto_classes_open_an_export_in_either_order(exports, tmp_path, name, order):
    folder, expected = exports[name]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", PROGRAM, str(folder), order]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cached, plain, kinds = done.stdout.splitlines()
    assert cached == plain == " ".join(map(str, expected))
    assert kinds == " ".join([STACKS[name][1], *CLASSES[name]])
