"""Models whose numbers are not finite, in every command that runs one: a sentence, exit code 2, nothing kept."""

import io
import math
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.tokenizer_files import read_tokenizer
from radlads.checksums import CHECKSUMS
from radlads.cli import main
from radlads.data.binidx import BinIdxReader
from radlads.evaluation.likelihood import log_likelihoods
from radlads.evaluation.perplexity import loss_by_position
from radlads.evaluation.retrieval import Prompt, Recall
from radlads.inference.finite import FiniteWatch, NotFinite


@pytest.fixture(scope="module")
def sound(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "hf"
    export(tiny.moved_student(teacher, folder.parent), teacher, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def overflowing(sound, tmp_path_factory):
    """A folder whose weights are a million times too large."""
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("overflowing") / "hf")
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1e6 * tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / CHECKSUMS).unlink()  # they are of the sound weights
    return folder


@pytest.fixture
def broken_at_7(sound):
    """A model that cannot read the token 7."""
    model = load_model(sound)
    model.model.embed_tokens.weight.data[7] = math.nan
    return model


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "Who?"],
        ["generate", "--prompt", "Who?", "--temperature", "0"],
        ["generate", "--prompts", "prompts"],
        ["generate", "--prompt", "Who?", "--save-state", "state"],
        ["generate", "--prompt", "Who?", "--save-state", "state", "--max-tokens", "0"],
        ["generate", "--prompt", "x" * 3000, "--save-state", "state", "--max-tokens", "0"],
        ["chat"],
        ["serve", "--port", "0"],
        ["longcontext", "--parts", "passkey", "--lengths", "300", "--depths", "0", "--samples", "2", "--out", "out"],
        ["longcontext", "--parts", "loss", "--lengths", "300", "--text", "text", "--out", "out"],
        ["longcontext", "--parts", "costs", "--lengths", "300", "--text", "text", "--out", "out"],
    ],
)
def test_a_command_ends_with_a_sentence_and_keeps_nothing(overflowing, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "prompts").write_text("Who?\nWhere is that?\n")
    (tmp_path / "text").write_text("It was a dark and stormy night. " * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\n")))
    assert main([words[0], str(overflowing), *words[1:], "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "are not finite within the first" in captured.err and "!" not in captured.out
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("state", "longcontext"))]


@pytest.mark.parametrize("segment_tokens", [5, 8192])
def test_likelihoods_name_the_texts_length(broken_at_7, segment_tokens):
    pairs = [([9] * 6, [3, 4, 5]), ([9] * 6, [3, 7, 5])]
    log_likelihoods(broken_at_7, pairs[:1], max_tokens=50)
    with pytest.raises(NotFinite, match="within the first 8 tokens"):
        log_likelihoods(broken_at_7, pairs, max_tokens=50, batch_rows=2, segment_tokens=segment_tokens)


def test_the_loss_by_position_names_the_segments_end(broken_at_7, tmp_path):
    stem = tmp_path / "text"
    with tiny.BinIdxWriter(stem, tiny.VOCAB) as writer:
        writer.add_document([9] * 12 + [7] + [9] * 20)
    with pytest.raises(NotFinite, match="within the first 16 tokens"):
        loss_by_position(broken_at_7, BinIdxReader(stem), context_tokens=32, edges=[0, 32], segment_tokens=8)


def test_recall_names_the_prompts_length(broken_at_7, teacher):
    recall = Recall(broken_at_7, read_tokenizer(teacher), batch_rows=2)
    with pytest.raises(NotFinite, match="within the first 4 tokens"):
        recall.num_right([Prompt([9, 9, 9, 9], [1]), Prompt([9, 9, 7, 9], [1])])


def test_generate_of_transformers_is_watched_while_the_watch_is_open(broken_at_7):
    tokens = torch.tensor([[9, 9, 9], [9, 9, 7]])
    keys = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    with FiniteWatch(broken_at_7) as watch:
        broken_at_7.generate(tokens[:1], **keys)
        watch.check()
        broken_at_7.generate(tokens, **keys)  # multinomial takes what the watch put in place of NaN
        with pytest.raises(NotFinite, match="within the first 3 tokens"):
            watch.check()
    assert broken_at_7(tokens).logits[1].isnan().any() and not broken_at_7._forward_hooks
