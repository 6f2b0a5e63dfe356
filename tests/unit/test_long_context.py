"""Facts in long prompts: how prompts are made, how answers are counted, and the command as a whole."""

import itertools
import json
import re
import weakref

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.tokenizer_files import read_tokenizer
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.evaluation import costs
from radlads.evaluation.costs import RUNS, cost_of_context
from radlads.evaluation.long_context import position_edges
from radlads.evaluation.retrieval import FILLER, Prompt, PromptWriter, Recall, retrieval_grid
from radlads.inference.generate import generate_tokens
from radlads.inference.prefill import prefill
from radlads.inference.sampling import Sampling
from radlads.model.cache import RecurrentCacheLayer
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM

TEXT = np.frombuffer(b"a text to hide things in, " * 9, dtype=np.uint8)


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(1)
    student, _ = build_student(open_teacher(teacher), tiny.stage_config(folder, "align").model)
    export(student, teacher, folder / "hf")
    return folder / "hf", student.eval()


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return read_tokenizer(teacher)


@pytest.mark.parametrize("task", ["passkey", "needle"])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_prompt_has_its_length_and_tells_its_answer_once(tokenizer, task, depth):
    prompt = PromptWriter(task, tokenizer, TEXT).write(401, depth, seed=3)
    assert len(prompt.tokens) == 401
    text, answer = tokenizer.decode(prompt.tokens), tokenizer.decode(prompt.answer)
    assert text.count(answer) == 1
    assert text.endswith(" is")
    assert text[text.index(answer) - 3 : text.index(answer)] == " is"


@pytest.mark.parametrize("depth", [0, 0.25, 1])
def test_the_fact_stands_at_its_depth_and_the_rest_is_whole(tokenizer, depth):
    prompt = PromptWriter("passkey", tokenizer, TEXT).write(600, depth, seed=0)
    text = tokenizer.decode(prompt.tokens)
    before, _, rest = text.partition("\nThe pass key is")
    after = rest.partition("Remember it.\n")[2].partition("\nWhat is")[0]
    hay = before.partition("memorize it.\n")[2]
    assert len(hay) == round(depth * len(hay + after))
    assert (FILLER * 9).startswith(hay + after)


def test_needles_are_hidden_in_the_text_given(tokenizer):
    text = np.arange(200)
    prompt = PromptWriter("needle", tokenizer, text).write(500, 0, seed=0)
    hay = prompt.tokens[-len("\nWhat is the magic number of Oslo? The magic number of Oslo is") - 250 :][:150]
    assert all((after - before) % 200 == 1 for before, after in itertools.pairwise(hay))


def test_prompts_depend_on_task_length_depth_and_seed_alone(tokenizer):
    writer = PromptWriter("needle", tokenizer, TEXT)
    assert writer.write(300, 0.5, seed=1) == PromptWriter("needle", tokenizer, TEXT).write(300, 0.5, seed=1)
    answers = {tuple(writer.write(300, 0.5, seed=seed).answer) for seed in range(20)}
    assert len(answers) == 20


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="100 tokens are too few for a passkey prompt, which takes 1"):
        PromptWriter("passkey", tokenizer, TEXT).write(100, 0, seed=0)


@pytest.mark.parametrize("softmax", [False, True])
def test_batches_count_what_single_prompts_say(student, teacher, tokenizer, softmax):
    model = build_teacher(open_teacher(teacher)) if softmax else student[1]
    asked = [PromptWriter("passkey", tokenizer, TEXT).write(220, 0.5, seed=seed).tokens for seed in range(5)]
    greedy = Sampling(temperature=0, max_tokens=6, num_ids=257)
    said = [generate_tokens(model, [tokens], greedy)[0] for tokens in asked]
    right = [Prompt(tokens, answer[: 4 + i % 3]) for i, (tokens, answer) in enumerate(zip(asked, said, strict=True))]
    recall = Recall(model, tokenizer, batch_rows=2)
    assert recall.num_right(right) == 5
    wrong = [*right[:4], Prompt(right[4].tokens, [*right[4].answer[:-1], (right[4].answer[-1] + 1) % 256])]
    assert recall.num_right(wrong) == 4


def test_the_grid_asks_every_length_at_every_depth_with_new_seeds(tokenizer):
    asked = []

    class Knowing:
        def num_right(self, prompts):
            asked.append(prompts)
            return len({tuple(prompt.answer) for prompt in prompts})

    writer = PromptWriter("passkey", tokenizer, TEXT)
    cells = retrieval_grid(Knowing(), writer, lengths=[250, 300], depths=[0, 1], num_samples=3, seed=7)
    assert [(cell.length_tokens, cell.depth) for cell in cells] == [(250, 0), (250, 1), (300, 0), (300, 1)]
    assert all(cell.num_right == cell.num_samples == 3 for cell in cells)
    assert asked[0][2] == writer.write(250, 0, seed=9)


class Standin(RadladsForCausalLM):
    """Reads like any model and says, whatever it computes, the number that it was told within the prompt.

    recalls: whether it says all of it, or another last digit.
    """

    recalls = True

    def forward(self, input_ids, attention_mask=None, **keys):
        outputs = super().forward(input_ids, attention_mask, **keys)
        if input_ids.shape[1] > 1:
            self.answers, self.num_said = [self.answer(bytes(row.clamp(max=255).tolist())) for row in input_ids], 0
        outputs.logits = torch.zeros_like(outputs.logits[:, -1:])
        for row, answer in enumerate(self.answers):
            outputs.logits[row, -1, answer[self.num_said]] = 1
        self.num_said += 1
        return outputs

    def answer(self, text):
        number = re.search(rb" is( \d+)\.", text).group(1)
        return number if self.recalls else number[:-1] + b"0123456789"[(number[-1] - 47) % 10 :][:1]


@pytest.fixture
def byte_tokenizer():
    """Whose ids are bytes, so that a stand-in can read a prompt."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("recalls", [True, False])
@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_a_model_that_recalls_gets_every_cell_right_and_one_wrong_digit_none(byte_tokenizer, task, recalls):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Standin(RadladsConfig(**tiny.SIZES | sizes | {"num_hidden_layers": 1}, time_mixers=["qwen2"])).eval()
    model.recalls = recalls
    cells = retrieval_grid(
        Recall(model, byte_tokenizer, batch_rows=2),
        PromptWriter(task, byte_tokenizer, TEXT),
        lengths=[230, 300],
        depths=[0, 0.5, 1],
        num_samples=3,
        seed=0,
    )
    assert [cell.num_right for cell in cells] == [3 if recalls else 0] * 6


def test_costs_count_the_bytes_that_a_cache_holds(student, teacher):
    for model in (student[1], build_teacher(open_teacher(teacher))):
        cost = cost_of_context(model, range(60))
        _, cache = prefill(model, torch.arange(60)[None])
        held = [
            tensor
            for layer in cache.layers
            for tensor in (layer.state if isinstance(layer, RecurrentCacheLayer) else (layer.keys, layer.values))
            if tensor is not None
        ]
        assert cost.state_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert cost.state_bytes == state_bytes(model.config, 60, bytes_per_value=4)
        assert cost.prefill_tokens_per_s > 0 and cost.decode_ms > 0 and cost.peak_bytes is None


def test_a_context_is_read_as_often_as_it_is_timed(student):
    lengths = []
    hook = student[1].model.embed_tokens.register_forward_hook(
        lambda module, args, out: lengths.append(args[0].numel())
    )
    cost_of_context(student[1], range(60))
    hook.remove()
    assert lengths.count(60) == 1 + RUNS + 1


def test_the_peak_is_counted_once_a_decoder_has_been_there_and_is_gone(student, monkeypatch):
    class Garbage:
        """Which only the collector finds."""

        def __init__(self):
            self.itself = self

    seen, left = [], []

    def decode(*args, **keys):
        seen.append("decode")
        left.append(weakref.ref(Garbage()))
        return 1.0

    monkeypatch.setattr(costs, "decode_ms", decode)
    monkeypatch.setattr(costs, "_begin_peak", lambda device: seen.append(left[0]() is None))
    cost_of_context(student[1], range(60))
    assert seen == ["decode", True, "decode"]


def test_edges_double():
    assert position_edges(16) == [0, 16]
    assert position_edges(100) == [0, 16, 32, 64, 100]
    assert position_edges(128) == [0, 16, 32, 64, 128]


def longcontext(*words):
    return main(["longcontext", *map(str, words)])


def test_the_command_measures_model_and_teacher(student, teacher, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 40)
    options = ["--lengths", "256", "--depths", "0,100", "--samples", 3, "--batch-size", 2, "--text-tokens", 600]
    where = ["--text", tmp_path / "book.txt", "--out", tmp_path / "out", "--device", "cpu"]
    assert longcontext(student[0], "--teacher", teacher, *options, *where) == 0
    results = json.loads((tmp_path / "out" / "longcontext.json").read_text())
    assert list(results["models"]) == ["student", "teacher"]
    for model in results["models"].values():
        assert [(cell["length_tokens"], cell["depth"]) for cell in model["needle"]] == [(256, 0.0), (256, 1.0)]
        assert sum(each["num_tokens"] for each in model["loss"]) == 512
        assert [cost["context_tokens"] for cost in model["costs"]] == [256]
    assert results["models"]["teacher"]["costs"][0]["state_bytes"] == 3 * 2 * 2 * 16 * 4 * 256
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"passkey-student", "needle-teacher", "loss-by-position", "cost-state-bytes"} <= names
    assert "passkey  0.0% of 6 right" in capsys.readouterr().out
    assert longcontext(student[0], *options, *where) == 2
    assert "longcontext.json exists already: remove it" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "longcontext.json").read_text()) == results


def test_the_tokenizer_that_is_named_comes_before_the_models_own(student, tmp_path, monkeypatch):
    tiny.save_tokenizer(tmp_path)
    bos, asked = tiny.put_bos_first(tmp_path), []
    monkeypatch.setattr(Recall, "num_right", lambda recall, prompts: asked.extend(prompts) or 0)
    options = ["--parts", "passkey", "--lengths", "256", "--depths", "0", "--samples", 1, "--device", "cpu"]
    assert longcontext(student[0], *options, "--out", tmp_path / "own") == 0
    assert longcontext(student[0], *options, "--out", tmp_path / "named", "--tokenizer", tmp_path) == 0
    assert [prompt.tokens[0] == bos for prompt in asked] == [False, True]


def test_what_a_later_part_lacks_is_told_before_the_first_is_measured(teacher, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("short")
    options = ["--parts", "passkey,loss", "--lengths", "300", "--samples", 1, "--text", tmp_path / "book.txt"]
    assert longcontext(teacher, "--out", tmp_path / "out", "--device", "cpu", *options) == 2
    out, err = capsys.readouterr()
    assert "book.txt has 6 tokens, too few for the loss in a window of 300: give more --text" in err
    assert "passkey" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "1m"], "--lengths takes numbers such as 512 or 8k, not '1m'"),
        (["--lengths", "4"], "--lengths must be different numbers of 16 tokens or more"),
        (["--depths", "0,120"], "--depths must be percentages from 0"),
        (["--depths", "nan"], "--depths must be percentages from 0"),
        (["--depths", ""], "--depths must be percentages from 0"),
        (["--depths", "50,50.0"], "--depths must be different from each other"),
        (["--parts", ""], "--parts takes one or more of passkey, needle, loss, costs"),
        (["--parts", "costs,costs"], "--parts takes one or more of passkey, needle, loss, costs, each once"),
        (["--text", "EMPTY"], "empty.txt is empty: give another --text"),
        (["--depths", "half"], "--depths takes percentages such as 0,50,100, not 'half'"),
        (["--parts", "passkey,ruler"], "--parts knows passkey, needle, loss, costs, not 'ruler'"),
        (["--samples", "0"], "--samples must be 1 or more"),
        (["--lengths", "64", "--parts", "passkey"], "64 tokens are too few for a passkey prompt"),
        (
            ["--lengths", "9k", "--parts", "loss", "--text", "TEXT"],
            "text has 6 tokens, too few for the loss in a window of 9,216",
        ),
        (["--text", "/no/such/file"], "/no/such/file: No such file"),
        (["--lengths", "100000000000", "--parts", "costs"], "shorten the prompt"),
    ],
)
def test_mistakes_are_one_sentence(teacher, tmp_path, capsys, words, message):
    (tmp_path / "text").write_text("short")
    (tmp_path / "empty.txt").touch()
    files = {"TEXT": tmp_path / "text", "EMPTY": tmp_path / "empty.txt"}
    words = [files.get(word, word) for word in words]
    assert longcontext(teacher, "--out", tmp_path / "out", "--device", "cpu", *words) == 2
    assert message in capsys.readouterr().err
