"""llama.cpp itself on what `--for-llama-cpp` writes: its converter, its logits, its greedy text. Opt-in, since it needs
llama.cpp; docs/publishing.md has the commands.

RADLADS_LLAMA_CPP: llama.cpp's source, with convert_hf_to_gguf.py. llama_cpp and sentencepiece are to be installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.config.load import load_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.recipes.reload_check import logits_of
from radlads.recipes.stage_configs import BUNDLED_TEACHER

SOURCE = os.environ.get("RADLADS_LLAMA_CPP")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="RADLADS_LLAMA_CPP names no llama.cpp source folder")

PROMPT = "import argparse\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser()\n"
NEW_TOKENS = 40
# The converter knows tokenizers by a hash of what they do, and the bundled teacher's is nobody's but ours
CONVERT = """
import runpy, sys
from pathlib import Path

script = Path(sys.argv[1])
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[1:]
runpy.run_path(str(script), run_name="__main__")
"""
RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama

gguf, token_ids, num_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = Llama(gguf, n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False)
model.eval(token_ids)
logits = np.array(model.scores[: len(token_ids)])
new = [int(logits[-1].argmax())]
while len(new) < num_new:
    model.eval(new[-1:])
    new.append(int(model.scores[model.n_tokens - 1].argmax()))
text = model.detokenize(token_ids + new).decode()
print(json.dumps({"logits": logits.tolist(), "new": new, "text": text}))
"""


def student_folder(folder: Path, **keys) -> Path:
    """The bundled teacher's RAD-RWKV6 student, its fresh parameters moved off their silent start, exported."""
    recipe = Path(BUNDLED_TEACHER).parent / "recipe" / "rad_rwkv6.yaml"
    source = open_teacher(BUNDLED_TEACHER)
    torch.manual_seed(0)
    student, _ = build_student(source, load_config([str(recipe)], keys).model)
    for name, parameter in student.named_parameters():
        if ".self_attn." in name and "_proj." not in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    export(student.eval(), source.folder, folder)
    return folder


def run_python(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def greedy(model, token_ids: list[int]) -> list[int]:
    new: list[int] = []
    while len(new) < NEW_TOKENS:
        new.append(int(logits_of(model, token_ids + new)[0, -1].argmax()))
    return new


@pytest.mark.parametrize("keys", [{}, {"model.use_tokenshift": 0}], ids=["token shift", "no token shift"])
def test_llama_cpp_gives_our_logits_and_our_text(tmp_path, keys):
    student = student_folder(tmp_path / "hf", **keys)
    assert main(["export", str(student), str(tmp_path / "out"), "--for-llama-cpp"]) == 0
    converter, gguf = Path(str(SOURCE)) / "convert_hf_to_gguf.py", tmp_path / "model.gguf"
    run_python("-c", CONVERT, converter, tmp_path / "out", "--outfile", gguf, "--outtype", "f32")
    tokenizer, model = Tokenizer.from_file(str(student / "tokenizer.json")), load_model(student)
    token_ids = tokenizer.encode(PROMPT).ids
    theirs = json.loads(run_python("-c", RUN, gguf, json.dumps(token_ids), NEW_TOKENS))
    difference = (logits_of(model, token_ids)[0] - torch.tensor(theirs["logits"])).abs().max().item()
    print(f"logits differ by at most {difference:.1e}")
    assert difference < 1e-4
    assert theirs["new"] == greedy(model, token_ids)
    assert theirs["text"] == tokenizer.decode(token_ids + theirs["new"])
