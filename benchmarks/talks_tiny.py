"""The teacher of `benchmarks/talks.py --tiny`: the bundled one with a chat template, made to end replies now."""

from pathlib import Path

import torch
from real_text import write_tiny_text
from safetensors.torch import load_file, save_file

from radlads.checkpoint.tokenizer_files import read_tokenizer
from radlads.convert.hf_source import end_of_text_id, open_teacher
from radlads.convert.student import build_teacher
from radlads.data.binidx import BinIdxReader

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Nats that the end of text gains everywhere
_LIKELIER = 14.0


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """The teacher's folder, and the folder of a little text of this Python."""
    teacher, data = write_tiny_text(folder)
    template = teacher / "chat_template.jinja"
    if template.read_text() != TEMPLATE:
        _have_replies_end(teacher, data)
        template.write_text(TEMPLATE)
    return teacher, data


@torch.no_grad()
def _have_replies_end(teacher: Path, data: Path) -> None:
    """Turn the end of text's row of the head towards what the head reads on average."""
    source = open_teacher(teacher)
    model = build_teacher(source)
    tokens = torch.from_numpy(BinIdxReader(data / "python-heldout").tokens[:512].astype("int64"))[None]
    mean = model.model(tokens, use_cache=False).last_hidden_state[0].mean(0)
    weights = load_file(teacher / "model.safetensors")
    head = weights["lm_head.weight"]
    head[end_of_text_id(teacher, read_tokenizer(teacher))] += (_LIKELIER * mean / mean.square().sum()).to(head.dtype)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
