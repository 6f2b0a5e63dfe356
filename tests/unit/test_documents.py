"""Documents within training rows: cut apart, or with the label between two of them masked."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.distill.documents import document_ends, rows_of_documents, rows_without_first_tokens
from radlads.distill.logits import build_stage
from radlads.model import block
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.registry import TIME_MIXERS
from radlads.train import fit

END = 256
MIX = {"train.teacher.hf_path": "named", "train.teacher.kl_weight": 0.25, "train.teacher.ce_weight": 0.75}


def rows():
    """[3, 21]: ends in the middle, first, next to each other, last but one, last; and a row without any."""
    tokens = torch.randint(256, (3, 21), generator=torch.Generator().manual_seed(5))
    tokens[0, [7, 19]] = END
    tokens[1, [0, 10, 11, 20]] = END
    return tokens


def apart(tokens):
    """The documents of two tokens and more, as [1, length], by hand."""
    found = []
    for row in tokens.tolist():
        document = []
        for token in row:
            document.append(token)
            if token == END:
                found.append(document)
                document = []
        found.append(document)
    return [torch.tensor([document]) for document in found if len(document) > 1]


class OwnRwkv7(RadRwkv7):
    """A mixer of the user's own, which knows nothing of texts."""

    def forward(self, x, state, v_first, shared):
        assert shared.texts is None
        return super().forward(x, state, v_first, shared)


@pytest.fixture(scope="module")
def pairs(teacher):
    """By mixer, a student whose every parameter has a gradient, and the teacher."""
    source = open_teacher(teacher)
    found = {}
    for mixer in ("rad_rwkv6", "rad_rwkv7", "qwen2", "own"):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TIME_MIXERS, "rad_rwkv7", OwnRwkv7 if mixer == "own" else RadRwkv7)
            keys = {"model.tmix": "rad_rwkv7" if mixer == "own" else mixer}
            student = build_student(source, tiny.stage_config(teacher, "distill", **keys).model)[0]
        for parameter in student.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        found[mixer] = student, build_teacher(source)
    return found


def stage(kind, **keys):
    overrides = {key if "." in key else f"train.{key}": value for key, value in keys.items()}
    return build_stage(tiny.stage_config(Path(), kind, **overrides).train, end_ids=(END,))


def learn(stage, student, teacher, batches):
    """The loss's sum and count over batches, and the gradients of the sum."""
    student.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for tokens in batches:
        for part in stage.parts(student, teacher, tokens):
            part.objective.backward()
            total, count = total + part.sum.item(), count + part.count
    return total, count, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@torch.no_grad()
def measured(stage, student, teacher, tokens):
    """The loss's sum."""
    return sum(part.sum.item() for part in stage.parts(student, teacher, tokens))


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == expected[1]
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("mixer", "kind", "keys"),
    [
        *((mixer, kind, {}) for mixer in ("rad_rwkv6", "rad_rwkv7") for kind in ("align", "distill", "extend")),
        ("rad_rwkv7", "align", {"align_loss": "mse"}),
        ("own", "align", {}),
        ("own", "distill", {}),
        ("rad_rwkv7", "extend", MIX),
        ("qwen2", "extend", {}),
    ],
)
def test_documents_of_a_row_are_as_if_each_were_alone(pairs, mixer, kind, keys):
    found = learn(stage(kind, reset_state_at_eos=1, **keys), *pairs[mixer], [rows()])
    alone = learn(stage(kind, **keys), *pairs[mixer], apart(rows()))
    assert_same(found, alone)
    assert len(apart(rows())) == 5


@pytest.mark.parametrize("kind", ["align", "distill", "extend"])
def test_another_first_document_changes_nothing_in_the_second(pairs, kind):
    student, frozen = pairs["rad_rwkv7"]
    one = rows()[:1]
    other = one.clone()
    other[0, 3] = (one[0, 3] + 100) % 256
    changes = {}
    for reset in (0, 1):
        whole, first = (
            [measured(stage(kind, reset_state_at_eos=reset), student, frozen, text) for text in texts]
            for texts in ((one, other), (one[:, :8], other[:, :8]))
        )
        changes[reset] = (whole[1] - whole[0]) - (first[1] - first[0])
    assert abs(changes[1]) < 2e-5 * whole[0] < abs(changes[0])


@pytest.mark.parametrize(("kind", "keys"), [("distill", {}), ("extend", {}), ("extend", MIX)])
def test_masked_labels_have_no_loss_and_are_not_counted(pairs, kind, keys):
    student, frozen = pairs["rad_rwkv7"]
    tokens = rows()
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[inputs == END] = -100
    weights = {"kl": 1.0, "ce": 0.0} if kind == "distill" else {"kl": 0.25, "ce": 0.75} if keys else {"kl": 0, "ce": 1}
    found = learn(stage(kind, mask_labels_at_eos=1, **keys), student, frozen, [tokens])
    student.zero_grad(set_to_none=True)
    log_p = student(inputs).logits.log_softmax(-1)
    log_q = frozen(inputs).logits.log_softmax(-1).detach()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)[labels >= 0].sum()
    loss = weights["kl"] * kl + weights["ce"] * F.nll_loss(log_p.mT, labels, ignore_index=-100, reduction="sum")
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same(found, (loss.item(), 60 - 5, gradients))


def test_masking_changes_nothing_in_align(pairs):
    student, frozen = pairs["rad_rwkv7"]
    plain = learn(stage("align"), student, frozen, [rows()])
    masked = learn(stage("align", mask_labels_at_eos=1), student, frozen, [rows()])
    assert masked[:2] == plain[:2]
    assert all(torch.equal(masked[2][name], gradient) for name, gradient in plain[2].items())


def test_rows_of_one_document_stay_as_they_are():
    tokens = rows()[2:]
    for cut in (rows_of_documents, rows_without_first_tokens):
        (sequences,) = cut(tokens, end_ids=(END,))
        assert torch.equal(sequences.inputs, tokens[:, :-1])
        assert torch.equal(sequences.labels, tokens[:, 1:])
        assert sequences.counted is None


def test_several_tokens_may_end_a_document():
    (found,) = rows_of_documents(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), end_ids=(3, 6))
    assert found.numbers.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert found.labels.tolist() == [[2, 3, -100, 5, 6, -100, 8]] and found.count == 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A .bin/.idx pair of documents of 1 to 24 tokens that end in END, and one of single tokens."""
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(2)
    with BinIdxWriter(folder / "train", tiny.VOCAB) as writer:
        for length in generator.integers(0, 24, 400):
            walk = np.cumsum(generator.integers(-3, 4, length)) % 256
            writer.add_document(np.append(walk, END))
    with BinIdxWriter(folder / "empty", tiny.VOCAB) as writer:
        for _ in range(400):
            writer.add_document(np.array([END]))
    return folder


def run(teacher, data, folder, kind="distill", student=None, **keys):
    overrides = {"my_exit_tokens": 16 * 4 * 2, **keys}
    config = tiny.stage_config(data, kind, **{f"train.{key}": value for key, value in overrides.items()})
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = student or build_student(source, config.model)[0]
    result = fit.run_stage(config, student, build_teacher(source), folder, tiny.Silent(), parent="test")
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], result.tokens


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_a_stage_trains_on_documents(teacher, corpus, tmp_path, kind):
    off, tokens = run(teacher, corpus, tmp_path / "off", kind)
    on = {"reset_state_at_eos": 1, "mask_labels_at_eos": 1, "eos_token_id": END}
    both, tokens_of_documents = run(teacher, corpus, tmp_path / "both", kind, **on)
    assert tokens_of_documents == tokens
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(off, both, strict=True))


def test_accumulating_unequal_counts_is_one_large_batch(teacher, corpus, tmp_path):
    keys = {"reset_state_at_eos": 1, "my_exit_tokens": 16 * 8 * 2}
    one, _ = run(teacher, corpus, tmp_path / "1x8", micro_bsz=1, accumulate_grad_batches=8, **keys)
    eight, _ = run(teacher, corpus, tmp_path / "8x1", micro_bsz=8, accumulate_grad_batches=1, **keys)
    assert one == pytest.approx(eight, rel=1e-5)


def test_documents_are_compiled_as_rows_are(teacher, corpus, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(block, "_compiled", lambda function, backend: asked.append(function.__name__) or function)
    run(teacher, corpus, tmp_path / "documents", reset_state_at_eos=1, compile="always", my_exit_tokens=64)
    assert {"mixed", "feed"} <= set(asked)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mask_labels_at_eos": 1, "eos_token_id": 7}, r"no document of .*train\.bin ends in token 7"),
        ({"reset_state_at_eos": 1, "data_file": ""}, "data_file is not set"),
    ],
)
def test_settings_without_a_meaning_are_refused(teacher, corpus, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        run(teacher, corpus, tmp_path / "run", **keys)
    assert not list(tmp_path.iterdir())


def test_an_unknown_end_is_asked_for(teacher, corpus):
    train = tiny.stage_config(corpus, "distill", **{"train.reset_state_at_eos": 1}).train
    known = open_teacher(teacher).config
    nameless = type(known)(**known.to_dict() | {"eos_token_id": None})
    corpora = [BinIdxReader(corpus / "train")]
    with pytest.raises(ValueError, match=r"names no end-of-text token: set train\.eos_token_id"):
        document_ends(train, [nameless], corpora)
    assert document_ends(train, [nameless, known], corpora) == (END,)
    known.eos_token_id = [7, END]
    assert document_ends(train, [known], corpora) == (7, END)


def test_a_step_without_anything_to_predict_is_refused(teacher, corpus, tmp_path):
    for kind in ("reset_state_at_eos", "mask_labels_at_eos"):
        with pytest.raises(ValueError, match=r"step 1 has nothing to predict"):
            run(teacher, corpus, tmp_path / kind, data_file=str(corpus / "empty"), **{kind: 1})
