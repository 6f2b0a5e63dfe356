"""Evaluation through lm-eval: our numbers against its own `hf` model's, batches, long texts, tables, mistakes."""

import functools
import json
import logging
import math
import sys

import pytest
import tiny
import torch

from radlads.checkpoint.hf_export import export
from radlads.cli import INTERRUPTED, USER_ERROR, main
from radlads.convert.hf_source import open_teacher, open_tokenizer
from radlads.convert.student import build_student
from radlads.evaluation.baselines import limit_attention, setup_student
from radlads.evaluation.likelihood import log_likelihoods
from radlads.evaluation.models import open_model
from radlads.evaluation.scores import Score, scores, table, task_names
from radlads.inference.finite import NotFinite

pytest.importorskip("lm_eval")
from radlads.evaluation.harness import Settings, open_tasks, run_tasks

TASKS = {
    "colours": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "endings": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * 20}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a", " b", " green"], "answer": 0},
    {"question": "Grass, in spring and in summer, is", "choices": [" green", " red"], "answer": 0},
    {"question": "Snow is", "choices": [" black, as a rule", " white"], "answer": 1},
    {"question": "A rose can be", "choices": [" x", " y"], "answer": 1},
    {"question": "Coal", "choices": [" 1", " 2", " 3", " 4"], "answer": 3},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without lm-eval's list of all installed packages, a second each time, and without its messages."""
    import lm_eval.evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Task files and their questions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """An exported RAD-RWKV7 student of the tiny teacher, its mixers moved away from silence."""
    torch.manual_seed(0)
    source = open_teacher(teacher)
    model, _ = build_student(source, tiny.stage_config(teacher, "align").model)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("models") / "student"
    export(model, teacher, folder)
    return folder


def run(folder, task_folder, dtype=torch.float32, **settings):
    model = open_model(folder, dtype)
    tokenizer = open_tokenizer(folder, model.config.vocab_size)
    return run_tasks(model, tokenizer, open_tasks(list(TASKS), task_folder), Settings(**settings))


@pytest.fixture(scope="module")
def by_twos(student, task_folder):
    """The student's results in batches of two."""
    return run(student, task_folder, batch_rows=2)


def metrics(results):
    return {
        (task, key): value
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


def answers(results, task):
    return [answer for sample in results["samples"][task] for answer in sample["filtered_resps"]]


def assert_same_numbers(results, expected):
    assert {task for task, _ in metrics(expected)} == set(TASKS)
    assert metrics(results) == pytest.approx(metrics(expected), rel=1e-5)
    assert answers(results, "endings") == answers(expected, "endings")
    for (found, greedy), (value, is_greedy) in zip(
        answers(results, "colours"), answers(expected, "colours"), strict=True
    ):
        assert found == pytest.approx(value, abs=1e-4) and greedy == is_greedy


def their_results(folder, task_folder, trust_remote_code, **keys):
    from lm_eval import simple_evaluate

    return simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "trust_remote_code": trust_remote_code, "dtype": "float32", **keys},
        tasks=list(TASKS),
        task_manager=open_tasks(list(TASKS), task_folder).manager,
        device="cpu",
        batch_size=2,
        bootstrap_iters=1000,
    )


def test_a_students_numbers_are_those_of_lm_evals_own_model(student, by_twos, task_folder):
    assert_same_numbers(by_twos, their_results(student, task_folder, trust_remote_code=True))


def test_a_teachers_numbers_are_those_of_lm_evals_own_model(teacher, task_folder):
    theirs = their_results(teacher, task_folder, trust_remote_code=False)
    assert_same_numbers(run(teacher, task_folder, batch_rows=3), theirs)


# The same bf16 products in batches of other shapes; observed 4e-6 of 10 to 80 nats. bf16 rounds a logit of 4 by 8e-3
BF16_NATS, BF16_BITS_PER_BYTE = 2e-2, 2e-3


def test_in_bf16_a_students_numbers_are_those_of_lm_evals_own_model(student, by_twos, task_folder):
    ours = run(student, task_folder, torch.bfloat16, batch_rows=2)
    theirs = their_results(student, task_folder, trust_remote_code=True, dtype="bfloat16", softmax_dtype="float32")
    for (found, _), (expected, _) in zip(answers(ours, "colours"), answers(theirs, "colours"), strict=True):
        assert found == pytest.approx(expected, abs=BF16_NATS)
    bits = ("texts", "bits_per_byte,none")
    assert metrics(ours)[bits] == pytest.approx(metrics(theirs)[bits], abs=BF16_BITS_PER_BYTE)
    assert abs(metrics(ours)[bits] - metrics(by_twos)[bits]) > 1e-6, "this was fp32"


def test_batches_change_nothing(student, by_twos, task_folder):
    assert_same_numbers(run(student, task_folder, batch_rows=1), by_twos)


def test_numbers_that_are_not_finite_end_it_naming_the_position(student, task_folder):
    model = open_model(student, torch.float32)
    tokenizer = open_tokenizer(student, model.config.vocab_size)
    model.model.embed_tokens.weight.data[tokenizer("r")["input_ids"]] = torch.nan
    with pytest.raises(NotFinite, match="not finite within the first 34 tokens"):  # of the longest question
        run_tasks(model, tokenizer, open_tasks(["endings"], task_folder), Settings(batch_rows=1))


def test_the_chat_template_wraps_questions(student, task_folder, tmp_path):
    for path in student.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    )
    results = run(tmp_path, task_folder, chat_template=True, limit=1)
    (sample,) = results["samples"]["endings"]
    assert sample["arguments"][0][0] == "<user>The sky is<bot>"


def random_pairs(lengths):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]
    return [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]


def direct(model, context, continuation):
    """The same by one pass over the whole text."""
    logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    right = torch.tensor(continuation)
    total = logits.log_softmax(-1).gather(1, right[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == right).all())


@pytest.mark.parametrize("segment_tokens", [8192, 7])
def test_log_likelihoods_are_those_of_one_pass(student, segment_tokens):
    model = open_model(student, torch.float32)
    pairs = random_pairs([5, 40, 23, 41])
    likely = model(torch.tensor([pairs[1][0]])).logits[0, -1].argmax().item()
    pairs += [(pairs[1][0], [likely]), (pairs[1][0], [likely ^ 1]), (pairs[1][0] + pairs[1][1][:-1], [3])]
    for first in (likely, likely ^ 1):
        second = model(torch.tensor([[*pairs[1][0], first]])).logits[0, -1].argmax().item()
        pairs.append((pairs[1][0], [first, second]))
    told = {}
    found = log_likelihoods(
        model, pairs, max_tokens=100, batch_rows=3, segment_tokens=segment_tokens, on_answer=told.__setitem__
    )
    expected = [direct(model, *pair) for pair in pairs]
    assert [told[number] for number in range(len(pairs))] == found
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found[4:]] == [True, False, False, True, False]


def test_a_text_that_is_too_long_loses_its_start(student):
    model = open_model(student, torch.float32)
    ((context, continuation),) = random_pairs([60])
    (found,) = log_likelihoods(model, [(context, continuation)], max_tokens=49)
    assert found[0] == pytest.approx(direct(model, context[10:], continuation)[0], abs=1e-3)


def test_only_recurrent_models_read_more_than_their_positions(student, teacher, task_folder, caplog):
    positions = open_model(student, torch.float32).config.max_position_embeddings
    run(student, task_folder, max_tokens=positions + 1, limit=1)
    with pytest.raises(ValueError, match="softmax layers"):
        run(teacher, task_folder, max_tokens=positions + 1, limit=1)


def test_an_answer_longer_than_a_text_may_be_is_refused(student):
    model = open_model(student, torch.float32)
    ((context, continuation),) = random_pairs([60])
    log_likelihoods(model, [(context, continuation)], max_tokens=30)
    with pytest.raises(ValueError, match="an answer of 30 tokens cannot be scored in texts of 29: raise --max-length"):
        log_likelihoods(model, [(context[:1], [3]), (context, continuation)], max_tokens=29)


def narrow(folder):
    model = open_model(folder, torch.float32)
    limit_attention(model, window_tokens=5, sink_tokens=2)
    return model


def test_windowed_attention_sees_sinks_and_the_last_tokens(teacher):
    model, whole = narrow(teacher), open_model(teacher, torch.float32)
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    taps = next(iter(model.model.attention_taps(tokens)))
    changed = taps.x.clone()
    changed[:, [2, 3, 9, 14]] += 1
    first = model.model.layers[0].self_attn
    before, after = (first(x, None, None, taps.shared)[0] for x in (taps.x, changed))
    assert torch.equal(before[:, 19], after[:, 19])
    changed[:, 1] += 1
    assert not torch.allclose(before[:, 19], first(changed, None, None, taps.shared)[0][:, 19])
    torch.testing.assert_close(model(tokens[:, :5]).logits, whole(tokens[:, :5]).logits)
    assert not torch.allclose(model(tokens).logits[:, -1], whole(tokens).logits[:, -1], atol=1e-3)


def test_windowed_attention_is_the_same_in_pieces_and_padded(teacher):
    model = narrow(teacher)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    cache, pieces = None, []
    for piece in tokens.split([8, 1, 1, 6, 1, 3], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], expected, atol=1e-4, rtol=1e-4)


def test_the_setup_row_has_the_teachers_weights_and_nothing_trained(student, teacher):
    trained, whole = open_model(student, torch.float32), open_model(teacher, torch.float32)
    state, theirs, trained_state = (
        model.state_dict() for model in (setup_student(trained.config, open_teacher(teacher)), whole, trained)
    )
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(state[query], theirs[query]) and not torch.equal(state[query], trained_state[query])
    assert state["model.layers.1.self_attn.w1"].abs().max() == 0
    assert state.keys() == trained_state.keys()


def score(value, *, chance=0.25, stderr=0.01, task="arc_easy"):
    return Score(task, "acc", value, stderr, 100, chance)


def test_relative_scores_leave_chance_out():
    assert score(0.5).relative_to(score(0.75)) == pytest.approx(0.5)
    assert score(0.5).relative_to(score(0.26)) is None
    assert score(0.5, chance=None).relative_to(score(0.75, chance=None)) is None
    assert score(0.5, chance=0.0).relative_to(score(0.5, chance=0.0, stderr=math.nan)) is None


def test_the_table_has_a_line_for_each_score():
    lines = table({"teacher": [score(0.75)], "mine": [score(0.5)]}, "teacher")
    assert lines[0].split() == ["task", "metric", "questions", "chance", "teacher", "mine"]
    assert lines[1].split(maxsplit=4) == ["arc_easy", "acc", "100", "25.0%", "75.0% ± 1.0  50.0% ± 1.0 (50.0%)"]


def test_groups_stand_for_their_tasks():
    results = {
        "group_subtasks": {"mmlu": ["mmlu_arts"], "mmlu_arts": ["a", "b"]},
        "results": {
            "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"},
            **{name: {"acc,none": 0.5, "acc_stderr,none": 0.1} for name in ("mmlu_arts", "a", "b")},
            "arc_easy": {"acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.4, "acc_norm_stderr,none": 0.1},
        },
        "configs": {name: {"output_type": "multiple_choice"} for name in ("a", "b", "arc_easy")},
        "n-samples": {"a": {"effective": 1}, "b": {"effective": 3}, "arc_easy": {"effective": 1}},
        "samples": {
            "a": [{"resps": [0] * 2}],
            "b": [{"resps": [0] * 4}] * 3,
            "arc_easy": [{"resps": [0] * 5}],
        },
    }
    group, single = scores(results)
    assert (group.task, group.metric, group.num_questions, group.chance) == ("mmlu", "acc", 4, (0.5 + 0.75) / 4)
    assert (single.task, single.metric, single.chance) == ("arc_easy", "acc", 0.2) and math.isnan(single.stderr)


def test_the_papers_suite():
    names = task_names(["paper", "piqa", "mine"])
    assert len(names) == 8 and names[-1] == "mine" and {"lambada_openai", "mmlu", "winogrande"} < set(names)


def evaluate(*words):
    return main(["eval", *map(str, words)])


def test_one_command_compares_student_teacher_and_baselines(
    student, teacher, task_folder, tmp_path, monkeypatch, capsys
):
    command = (student, "--teacher", teacher, "--baselines", "--include-path", task_folder, "--device", "cpu")
    command += ("--tasks", "colours,endings", "--cache", tmp_path / "cache")
    assert evaluate(*command, "--output", tmp_path / "results.json") == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    header, *rows = first.splitlines()[4:]
    assert header.split() == ["task", "metric", "questions", "chance", "teacher", "teacher", "64+4", "setup", "student"]
    assert [row.split()[:3] for row in rows] == [
        ["colours", "acc", "5"],
        ["colours", "acc_norm", "5"],
        ["endings", "exact_match", "5"],
    ]
    assert rows[0].split()[3] == "40.0%"
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert len(written["scores"]) == 12 and set(written["lm_eval"]) == {"teacher", "teacher 64+4", "setup", "student"}

    monkeypatch.setattr("radlads.evaluation.harness.log_likelihoods", None)
    monkeypatch.setattr("radlads.model.modeling.RadladsForCausalLM.generate", None)
    assert evaluate(*command) == 0
    assert capsys.readouterr().out == first
    assert evaluate(*command, "--limit", 2) == 0
    assert evaluate(*command, "--output", tmp_path / "results.json") == USER_ERROR
    assert "results.json exists already: remove it, or choose another --output" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text()) == written
    monkeypatch.setattr("radlads.evaluation.command.weights_hash", lambda folder: "others")
    with pytest.raises(TypeError):
        evaluate(*command)


def test_an_interrupted_evaluation_goes_on(student, task_folder, tmp_path, monkeypatch, capsys):
    asked = []

    def interrupted(model, pairs, *, on_answer, **options):
        asked.append(len(pairs))
        for number in range(len(pairs) // 2):
            on_answer(number, (-1.0, False))
        raise KeyboardInterrupt

    monkeypatch.setattr("radlads.evaluation.harness.log_likelihoods", interrupted)
    command = (student, "--tasks", "colours", "--include-path", task_folder, "--cache", tmp_path, "--device", "cpu")
    assert evaluate(*command) == INTERRUPTED
    assert evaluate(*command) == INTERRUPTED
    first, second = asked
    assert second == first - first // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "colour"], "did you mean colours"),
        (["--tasks", "colours", "--limit", "-1"], "--limit must be a number above 0, not -1"),
        (["--tasks", "colours", "--limit", "nan"], "--limit must be a number above 0, not nan"),
        (["--tasks", "colours", "--limit", "inf"], "--limit must be a number above 0, not inf"),
        (["--tasks", "colours", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--tasks", "colours", "--max-length", "0"], "--max-length must be 1 or more"),
        (["--tasks", "colours", "--num-fewshot", "-1"], "--num-fewshot must be 0 or more"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "colours", "--max-length", "9"], "tokens cannot be scored in texts of 9"),
        (["--tasks", "colours", "--apply-chat-template"], "has no chat template"),
        (["--tasks", "endings", "--max-length", "12"], "endings generates 12 tokens"),
        (["--tasks", "colours", "--baselines"], "--baselines needs --teacher"),
        (["--tasks", "colours", "--output", "no/such/file.json"], "no/such is not a folder"),
        (["--tasks", "colours", "--output", "/"], "/ is a folder: name the file"),
        (["--tasks", "colours", "--include-path", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(options, message, student, task_folder, monkeypatch, capsys):
    import lm_eval.tasks

    index = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # lm-eval's own take ten seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", index)
    assert evaluate(student, "--include-path", task_folder, *options) == USER_ERROR
    error = capsys.readouterr().err
    told = [line for line in error.splitlines() if line.startswith("radlads: ")]
    assert len(told) == 1 and message in told[0] and "Traceback" not in error


def test_a_folder_that_is_no_model_is_told(tmp_path, capsys):
    assert evaluate(tmp_path) == USER_ERROR
    assert "is not a model folder" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[0].content / 2 }}"])
def test_a_template_that_does_not_work_is_told_before_any_model_runs(
    template, student, task_folder, tmp_path, monkeypatch, capsys
):
    for path in student.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("radlads.evaluation.models.open_model", None)
    command = (tmp_path, "--tasks", "colours", "--include-path", task_folder, "--apply-chat-template")
    assert evaluate(*command) == USER_ERROR
    assert f"radlads: the chat template of {tmp_path} fails: " in capsys.readouterr().err


def test_a_template_that_fails_at_a_question_is_told(student, task_folder, tmp_path, capsys):
    for path in student.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'sky' in m.content %}{{ 1 / 0 }}{% endif %}{{ m.content }}{% endfor %}"
    )
    command = (tmp_path, "--tasks", "colours", "--include-path", task_folder, "--apply-chat-template")
    assert evaluate(*command, "--device", "cpu") == USER_ERROR
    assert f"radlads: the chat template of {tmp_path} fails: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"time_mixers": 3}, {"rope_parameters": "yarn"}, {"dtype": ["a"]}])
def test_a_damaged_configuration_is_told(student, tmp_path, capsys, values):
    config = json.loads((student / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    assert evaluate(tmp_path) == USER_ERROR
    assert "config.json describes no model that can be read here" in capsys.readouterr().err


def test_without_lm_eval_the_remedy_is_told(student, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert evaluate(student) == USER_ERROR
    assert "pip install 'radlads[eval]'" in capsys.readouterr().err


def test_a_folder_without_tokenizer_takes_another(student, teacher, task_folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(student / name)
    command = (tmp_path, "--tasks", "colours", "--include-path", task_folder, "--limit", 1, "--device", "cpu")
    assert evaluate(*command) == USER_ERROR
    assert "--tokenizer" in capsys.readouterr().err
    assert evaluate(*command, "--tokenizer", teacher) == 0


def test_the_tokenizer_that_is_named_comes_before_the_models_own(student, task_folder, tmp_path, monkeypatch, capsys):
    tiny.save_tokenizer(tmp_path)
    bos = tiny.put_bos_first(tmp_path)
    read = []

    def noted(model, pairs, **options):
        read.extend(context[0] for context, _ in pairs)
        return [(-1.0, False)] * len(pairs)

    monkeypatch.setattr("radlads.evaluation.harness.log_likelihoods", noted)
    command = (student, "--tasks", "colours", "--include-path", task_folder, "--limit", 1, "--device", "cpu")
    assert evaluate(*command) == evaluate(*command, "--tokenizer", tmp_path) == 0, capsys.readouterr().err
    assert [first == bos for first in read] == [False] * 4 + [True] * 4


def test_a_missing_tokenizer_is_told_before_any_model_runs(student, task_folder, tmp_path, monkeypatch, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(student / name)
    monkeypatch.setattr("radlads.evaluation.models.open_model", None)
    assert evaluate(student, tmp_path, "--tasks", "colours", "--include-path", task_folder) == USER_ERROR
    assert "--tokenizer" in capsys.readouterr().err


def test_another_tokenizer_configuration_is_asked_anew(student, task_folder, tmp_path):
    for path in student.iterdir():
        (tmp_path / path.name).symlink_to(path)
    command = (tmp_path, "--tasks", "colours", "--include-path", task_folder, "--cache", tmp_path / "cache")
    assert evaluate(*command, "--device", "cpu") == 0
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "bos_token": "a"}')
    assert evaluate(*command, "--device", "cpu") == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
