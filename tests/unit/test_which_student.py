"""The figures of docs/which_student.md: memory is what the models say, speed is what was measured."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from radlads.convert.shapes import open_shape
from radlads.model.configuration import state_bytes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "which_student.md").read_text()
WINDOW = {"model.mixer.window_tokens": "64", "model.mixer.sink_tokens": "4"}
KEPT = {"model.softmax_layers": "auto:3"}
STUDENTS = {"pure": {}, "window": WINDOW, "3 kept layers": KEPT, "window, 3 kept layers": WINDOW | KEPT}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """What open_shape takes, by the page's names."""
    folder = tmp_path_factory.mktemp("smollm2")
    LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return {"Qwen2.5-7B": "7b", "SmolLM2-135M": str(folder)}


def numbers(line):
    return [float(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,.]+) (?=\|)", line)]


@pytest.mark.parametrize("teacher", ["Qwen2.5-7B", "SmolLM2-135M"])
def test_memory_is_what_the_models_say(sizes, teacher):
    rows = {
        line.split("|")[1].strip(): numbers(line) for line in PAGE.splitlines() if line.startswith(f"| {teacher}: ")
    }
    contexts = (1024, 8192, 32768, 131072)
    configs = {name: open_shape(sizes[teacher], overrides=keys).student for name, keys in STUDENTS.items()}
    configs["teacher"] = open_shape(sizes[teacher]).teacher
    assert rows.keys() == {f"{teacher}: {name}" for name in configs}
    for name, config in configs.items():
        held = [state_bytes(config, tokens) / 1e6 for tokens in contexts]
        assert rows[f"{teacher}: {name}"] == pytest.approx(held, abs=0.0501)


def test_speed_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "h200.json").read_text())
    rows = re.findall(r"^\| (?:reading|decoding) .*$", PAGE, re.MULTILINE)
    cases = ("prefill_8k", "decode_b1_8k", "decode_b1_64k", "decode_b32")
    expected = [[results[name] for name in (case, f"{case}_window64") if name in results] for case in cases]
    assert [numbers(row) for row in rows] == [[round(entry["tokens_per_s"]) for entry in row] for row in expected]
