"""A named teacher from its wheel to a student that chats: what a newcomer does, with a tiny model by the name."""

import json

import named_teacher
import pytest

from radlads.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def converted(tmp_path, monkeypatch, capsys):
    """The demo's folder and what it printed."""
    wheel = named_teacher.put_in_place(monkeypatch, tmp_path)
    wheel.rename(tmp_path / "cache" / wheel.name)
    out = tmp_path / "out"
    few = ["--set", "train.my_exit_tokens=2048", "--set", "train.precision=fp32", "--set", "train.heldout_tokens=512"]
    assert main(["demo", "--teacher", "smollm2", "--out", str(out), *few]) == 0
    return out, capsys.readouterr().out


def test_it_is_fetched_converted_and_talks_by_its_own_template(converted, monkeypatch, capsys):
    out, said = converted
    assert "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0), once" in said
    assert "tiny.gguf: dequantised to fp32" in said
    assert "held out                     loss" in said
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["decode_ms"]["student"]) == ["100", "1000"]
    assert (out / "hf" / "chat_template.jinja").read_text().startswith("{% for m in messages %}")
    assert (
        main(["generate", str(out / "hf"), "--prompt", "ab", "--max-tokens", "3", "--save-state", str(out / "s")]) == 0
    )
    assert (
        main(["generate", str(out / "hf"), "--load-state", str(out / "s"), "--prompt", "a", "--max-tokens", "2"]) == 0
    )
    card = main(["export", str(out), str(out.parent / "published")])
    assert card == 0
    assert "license: apache-2.0" in (out.parent / "published" / "README.md").read_text()
