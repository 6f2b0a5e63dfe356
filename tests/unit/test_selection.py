"""The search for layers to keep: what it measures, in what order it chooses, and what it costs."""

import itertools

import pytest
import tiny
import torch
import torch.nn.functional as F

from radlads.config.layer_lists import uniform_layers
from radlads.convert.hf_source import open_teacher
from radlads.convert.kept_layers import kept_student
from radlads.convert.student import build_student, build_teacher
from radlads.evaluation.retrieval import Prompt
from radlads.selection.probes import NeedleProbe, TextProbe, rank, recalled
from radlads.selection.record import read_layers, record_of, table_lines, text_of
from radlads.selection.search import search
from radlads.train.processes.group import Processes


@pytest.fixture(scope="module")
def softmax(teacher):
    return build_teacher(open_teacher(teacher))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    return tiny.moved_student(teacher, tmp_path_factory.mktemp("student")).eval()


def windows(rows=5, number=129, vocabulary=9):
    return torch.randint(vocabulary, (rows, number), generator=torch.Generator().manual_seed(0))


def found_by(student, teacher, probe, keep=2, **more):
    return search(student, teacher, probe, keep=keep, candidates=[0, 1, 2], console=tiny.Silent(), **more)


def test_recalled_pairs_by_hand():
    row = torch.tensor([[5, 6, 7, 5, 6, 5, 6, 7, 6]])
    # Pairs:             56 67 75 56 65 56 67 76
    expected = {1: [0, 0, 0, 1, 0, 1, 1, 0], 3: [0, 0, 0, 1, 0, 1, 1, 0], 4: [0, 0, 0, 0, 0, 1, 1, 0], 6: [0] * 8}
    for distance, marks in expected.items():
        assert recalled(row, distance).int().tolist() == [marks]


def test_a_pair_of_another_row_is_not_recalled():
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 1, 2]])
    assert recalled(rows, 1).tolist() == [[False] * 3, [False, False, True]]


def test_values_are_those_of_whole_models(student, softmax):
    rows = windows()
    selection = found_by(student, softmax, TextProbe(rows, "kl"))
    measured = {each.layers: each.values for each in (*selection.curve, *selection.uniform)}
    for each in selection.rounds:
        measured |= {tuple(sorted((*each.kept, layer))): values for layer, values in each.values.items()}
    assert len(measured) == 1 + 3 + 3 - (
        1 if {(0, 2), selection.layers} == {(0, 2)} else 1 if (0, 2) in measured else 0
    )
    marked = recalled(rows)
    with torch.no_grad():
        log_p = softmax(rows[:, :-1]).logits.log_softmax(-1)
        for layers, values in measured.items():
            log_q = kept_student(student, softmax, layers)(rows[:, :-1]).logits.log_softmax(-1)
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            assert values["kl"] == pytest.approx(kl.mean().item(), abs=1e-6)
            assert values["recalled"] == pytest.approx(kl[marked].mean().item(), abs=1e-6)


@pytest.mark.parametrize("by", ["kl", "recalled"])
def test_each_round_takes_the_best_beside_those_chosen(student, softmax, by):
    selection = found_by(student, softmax, TextProbe(windows(), by), keep=3)
    kept = ()
    for each in selection.rounds:
        assert each.kept == kept and set(each.values) == {0, 1, 2} - set(kept)
        assert each.values[each.chosen][by] == min(values[by] for values in each.values.values())
        kept = tuple(sorted((*kept, each.chosen)))
    assert selection.layers == (0, 1, 2)
    assert [len(each.layers) for each in selection.curve] == [0, 1, 2, 3]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_layer_that_is_broken_is_chosen_first(teacher, softmax, tmp_path, broken):
    torch.manual_seed(0)
    model = tiny.stage_config(tmp_path, "align", **{"model.gate_rank_type": 0}).model
    student, _ = build_student(open_teacher(teacher), model)
    projections = [block.self_attn.o_proj.weight.data for block in student.model.layers]
    for projection in projections:
        projection.mul_(0.1)
    projections[broken].copy_(torch.randn_like(projections[broken]))
    selection = found_by(student, softmax, TextProbe(windows(vocabulary=250), "kl"), keep=1)
    assert selection.order == [broken]


def test_a_student_that_is_its_teacher_chooses_the_first_layers(softmax):
    selection = found_by(softmax, softmax, TextProbe(windows(), "kl"))
    assert selection.order == [0, 1]
    assert selection.none["kl"] == pytest.approx(0, abs=1e-6)


def test_neither_model_changes(student, softmax):
    before = [[x.clone() for x in model.parameters()] for model in (student, softmax)]
    found_by(student, softmax, TextProbe(windows(), "kl"), keep=3)
    after = [list(model.parameters()) for model in (student, softmax)]
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))
    assert student.config.time_mixers == ["rad_rwkv7"] * 3


def test_layers_below_a_swapped_one_do_not_run_again(student, softmax, monkeypatch):
    runs = []
    for number, block in enumerate(student.model.layers):
        feed = block.feed
        monkeypatch.setattr(block, "feed", lambda x, feed=feed, number=number: (runs.append(number), feed(x))[1])
    selection = found_by(student, softmax, TextProbe(windows(1), "kl"), keep=1)
    # The trace; then the student with layer 0, 1 and 2, the last of which is uniform spacing too
    assert sorted(runs) == sorted([0, 1, 2, 0, 1, 2, 1, 2, 2])
    assert selection.block_runs == len(runs)


def test_of_three_processes_each_measures_its_own(student, softmax, monkeypatch):
    probe = TextProbe(windows(), "kl")
    alone = found_by(student, softmax, probe, keep=1)
    parts = []
    for rank_ in range(3):
        own = Processes(rank=rank_, size=3)
        monkeypatch.setattr(Processes, "gather", lambda self, value: [*parts, value])
        if rank_ < 2:  # lacks what the last has, so that it cannot choose
            monkeypatch.setattr(Processes, "gather", lambda self, value: parts.append(value) or [_Any(value)])
        selection = found_by(student, softmax, probe, keep=1, processes=own)
    assert [len(part) for part in parts] == [2, 1]
    assert (selection.rounds, selection.uniform, selection.none) == (alone.rounds, alone.uniform, alone.none)


class _Any(dict):
    """Values of any student that is asked for."""

    def __init__(self, own):
        layers = {(), (0,), (1,), (2,)}
        super().__init__({each: {"kl": 0.0} for each in layers} | own)


@pytest.mark.parametrize("keep", [0, 4])
def test_a_number_that_cannot_be_kept_is_refused(student, softmax, keep):
    with pytest.raises(ValueError, match=f"^{keep} layers cannot be kept: the student has 3 that are not softmax yet$"):
        found_by(student, softmax, TextProbe(windows(), "kl"), keep=keep)


def test_values_that_are_not_numbers_choose_nothing(student, softmax, monkeypatch):
    probe = TextProbe(windows(), "kl")
    monkeypatch.setattr(probe, "values", lambda sums: {"kl": float("nan")})
    with pytest.raises(ValueError, match=r"^kl nan was measured of the student, so that nothing can be chosen: check"):
        found_by(student, softmax, probe)


def test_recalled_pairs_of_random_rows():
    rows = torch.randint(5, (4, 129), generator=torch.Generator().manual_seed(0))
    pairs = [list(itertools.pairwise(row)) for row in rows.tolist()]
    for distance in (1, 3, 64):
        expected = [[pair in row[: max(0, t + 1 - distance)] for t, pair in enumerate(row)] for row in pairs]
        assert recalled(rows, distance).tolist() == expected


def test_text_without_recalled_pairs():
    rows = torch.arange(130).view(2, 65)
    assert TextProbe(rows, "kl").num_recalled == 0
    with pytest.raises(ValueError, match=r"^no pair of tokens of this text stands twice in a window of 64, 64 tokens"):
        TextProbe(rows, "recalled")


@torch.no_grad()
def test_needles_are_right_where_greedy_decoding_is(student, softmax):
    prompts = []
    for number, wrong in enumerate([None, 0, 2, None, 1]):
        tokens = windows(1, 30, 250)[0].roll(number).tolist()
        said = student.generate(torch.tensor([tokens]), max_new_tokens=3, do_sample=False)[0, 30:].tolist()
        answer = [token if place != wrong else (token + 1) % 250 for place, token in enumerate(said)]
        prompts.append(Prompt(tokens, answer[: 2 + (number != 3)]))
    probe = NeedleProbe(prompts, num_ids=tiny.VOCAB)
    selection = found_by(student, softmax, probe, keep=1)
    assert selection.none["needle"] == 2 / 5
    losses = []
    for prompt in prompts:
        logits = student(torch.tensor([prompt.tokens + prompt.answer])).logits[0, 29:-1]
        losses.append(F.cross_entropy(logits, torch.tensor(prompt.answer), reduction="sum").item())
    assert selection.none["answer_loss"] == pytest.approx(sum(losses) / 14, abs=1e-5)


def test_ids_that_are_no_tokens_are_not_said(student, softmax):
    prompt = Prompt(windows(1, 30, 250)[0].tolist(), [3])
    probe = NeedleProbe([prompt], num_ids=4)
    (batch,) = probe.asked(student, softmax)
    hidden = torch.zeros(1, 30, 64)
    head = student.lm_head.weight.detach()
    hidden[0, 29] = head[3] + 2 * head[100]
    logits = head @ hidden[0, 29]
    assert (logits.argmax(), logits[:4].argmax()) == (100, 3)
    with torch.no_grad():
        assert probe.values(batch.sums(hidden))["needle"] == 1


def test_of_equal_shares_the_surer_answers_are_better():
    better, worse = {"needle": 0.5, "answer_loss": 1.0}, {"needle": 0.5, "answer_loss": 2.0}
    assert rank(better, "needle") < rank(worse, "needle") < rank({"needle": 0.4, "answer_loss": 0.1}, "needle")


@pytest.mark.parametrize(
    ("layers", "number", "expected"),
    [
        (range(8), 1, (7,)),
        (range(8), 2, (3, 7)),
        (range(28), 3, (8, 17, 27)),
        ([1, 2, 5], 2, (1, 5)),
        (range(4), 4, (0, 1, 2, 3)),
    ],
)
def test_uniform_layers(layers, number, expected):
    assert uniform_layers(layers, number) == expected


def test_the_file_is_read_only_as_what_is_expected(student, softmax, tmp_path):
    selection = found_by(student, softmax, TextProbe(windows(), "kl"))
    path = tmp_path / "layers.json"
    assert read_layers(path, {}) is None
    path.write_text(text_of(record_of(selection, {"text": "a book"})))
    assert read_layers(path, {"keep": 2, "text": "a book"}) == list(selection.layers)
    assert read_layers(path, {"keep": 3}) is None
    path.write_text('{"layers": "5"}')
    with pytest.raises(ValueError, match="is damaged: remove it to have the layers selected again"):
        read_layers(path, {})


def test_the_table_has_the_best_layer_first(student, softmax):
    selection = found_by(student, softmax, TextProbe(windows(), "kl"))
    lines = list(table_lines(selection))
    assert lines[1].split()[:2] == ["1", str(selection.order[0])]
    assert [line.split()[0] for line in lines[6:]] == ["0", "1", "2", "1", "2"]
    assert lines[9].endswith("2 (uniform spacing)") and lines[10].endswith("0,2 (uniform spacing)")
