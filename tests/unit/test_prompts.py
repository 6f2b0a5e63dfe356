"""What tokens a raw text becomes: those of transformers' tokenizer, whichever command reads it."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.convert.hf_source import load_tokenizer, open_tokenizer
from radlads.evaluation.retrieval import PromptWriter
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.generate import Sampling, generate_tokens
from radlads.inference.prompts import first_ids, prompt_ids
from radlads.inference.saved_state import fingerprint, load_state

# As Llama 3's: the template writes the BOS itself
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
QUIET = ["--temperature", "0", "--max-tokens", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """An exported student whose tokenizer begins every text with a BOS."""
    folder = tmp_path_factory.mktemp("bos") / "hf"
    student = tiny.moved_student(teacher, folder.parent)
    export(student, teacher, folder)
    tiny.put_bos_first(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ours(folder):
    return open_tokenizer(folder, tiny.VOCAB)._tokenizer


def test_a_raw_text_begins_with_the_bos_that_transformers_puts_there(theirs, ours):
    assert (
        prompt_ids(ours, "Who?") == theirs("Who?")["input_ids"] == [theirs.bos_token_id, *prompt_ids(ours, "Who?")[1:]]
    )
    assert first_ids(ours) == [theirs.bos_token_id]


def test_a_text_that_goes_on_has_no_bos_and_no_text_has_no_tokens(theirs, ours):
    assert prompt_ids(ours, "Who?", continues=True) == theirs("Who?", add_special_tokens=False)["input_ids"]
    assert prompt_ids(ours, "") == []


def test_a_tokenizer_without_bos_puts_nothing_first(teacher):
    tokenizer = open_tokenizer(teacher, tiny.VOCAB)._tokenizer
    assert first_ids(tokenizer) == []
    assert tokenizer.decode(prompt_ids(tokenizer, "Who?")) == "Who?"


@pytest.fixture
def filling(folder, tmp_path):
    """A folder whose tokenizer.json asks for short texts to be filled up, on the left, and for long ones to be cut."""
    copy = shutil.copytree(folder, tmp_path / "filling")
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9, direction="left")
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.mark.parametrize("opened", [load_tokenizer, lambda *args: open_tokenizer(*args)._tokenizer])
def test_a_long_text_is_not_cut_short_nor_a_short_one_filled_up(filling, theirs, opened):
    tokenizer = opened(filling, tiny.VOCAB)
    assert first_ids(tokenizer) == [theirs.bos_token_id]
    assert prompt_ids(tokenizer, "?") == theirs("?")["input_ids"]
    assert len(prompt_ids(tokenizer, "Who are you?")) == 13
    assert len(PromptWriter("passkey", tokenizer, np.arange(200)).write(400, 0.5, seed=0).tokens) == 400


def generated(capsys, folder, *words):
    assert main(["generate", str(folder), *QUIET, *map(str, words)]) == 0
    return capsys.readouterr().out


def expected(folder, tokenizer, ids):
    greedy = Sampling(temperature=0, max_tokens=8, num_ids=258)
    (tokens,) = generate_tokens(load_model(folder), [ids], greedy, frozenset({256}))
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_generate_reads_a_prompt_as_transformers_does(folder, theirs, tmp_path, capsys):
    told = expected(folder, theirs, theirs("Who are you?")["input_ids"])
    assert told != expected(folder, theirs, theirs("Who are you?", add_special_tokens=False)["input_ids"])
    assert generated(capsys, folder, "--prompt", "Who are you?") == f"{told}\n"
    (tmp_path / "prompts.txt").write_text("Who are you?\n")
    assert json.loads(generated(capsys, folder, "--prompts", tmp_path / "prompts.txt"))["text"] == told


def test_a_saved_text_begins_with_the_bos_and_what_follows_does_not(folder, theirs, tmp_path, capsys):
    state = tmp_path / "state"
    assert main(["generate", str(folder), "--prompt", "It was", "--save-state", str(state), "--max-tokens", "0"]) == 0
    model = load_model(folder)
    begun = theirs("It was")["input_ids"]
    assert load_state(model, fingerprint(folder, model.config), state).tail == begun
    capsys.readouterr()
    told = expected(folder, theirs, [*begun, *theirs(" dark", add_special_tokens=False)["input_ids"]])
    assert generated(capsys, folder, "--load-state", state, "--prompt", " dark") == f"{told}\n"


def test_a_chats_only_bos_is_its_templates(folder, theirs):
    messages = [{"role": "user", "content": "Who?"}]
    ids = ChatTemplate(folder, tiny.VOCAB).token_ids(messages)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(theirs.bos_token_id) == 1


@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_long_prompts_begin_with_the_bos_and_have_their_length(ours, theirs, task):
    prompt = PromptWriter(task, ours, np.arange(200)).write(400, 0.5, seed=0)
    assert prompt.tokens[0] == theirs.bos_token_id and len(prompt.tokens) == 400
    assert theirs.bos_token_id not in [*prompt.tokens[1:], *prompt.answer]


def test_scores_are_of_texts_with_the_bos(folder, theirs):
    harness = pytest.importorskip("radlads.evaluation.harness")
    pytest.importorskip("lm_eval")
    model = load_model(folder)
    lm = harness.language_model(model, open_tokenizer(folder, tiny.VOCAB))
    from lm_eval.api.instance import Instance

    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("Who", " are"), 0)], disable_tqdm=True)
    ids = theirs("Who are")["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found == pytest.approx(sum(logits[place - 1, ids[place]].item() for place in range(4, 8)), abs=1e-3)
