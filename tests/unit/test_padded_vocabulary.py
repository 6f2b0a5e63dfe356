"""Embeddings with more rows than the tokenizer has ids: the padding rows are neither drawn nor in the way of KL."""

import dataclasses
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.tokenizer_files import num_ids
from radlads.convert.hf_source import load_tokenizer, open_teacher
from radlads.convert.student import build_student
from radlads.distill.losses import head_loss, kl_divergence
from radlads.inference.generate import Sampling, choose, stream_rows, stream_text, stream_tokens

IDS = 257  # of the tiny tokenizer; the embedding has tiny.VOCAB = 260 rows
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(seed=0),
    Sampling(seed=0, top_k=5),
    Sampling(seed=0, top_p=0.9),
    Sampling(seed=0, temperature=3.0, top_k=259, top_p=0.99),
]


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    model = tiny.stage_config(tmp_path_factory.mktemp("none"), "align").model
    return build_student(open_teacher(teacher), model)[0].eval()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ids_beyond_the_tokenizer_are_never_chosen(sampling):
    logits = torch.randn(500, 260, generator=torch.Generator().manual_seed(1))
    logits[:, IDS:] += 20
    draws = torch.linspace(0, 1 - 2**-24, 500)
    assert (choose(logits, sampling, draws) >= IDS).any()
    assert (choose(logits, dataclasses.replace(sampling, num_ids=IDS), draws) < IDS).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_choice_is_that_of_a_model_without_padding(sampling):
    logits = torch.randn(200, 260, generator=torch.Generator().manual_seed(2))
    draws = torch.rand(200, generator=torch.Generator().manual_seed(3))
    cut = choose(logits[:, :IDS].contiguous(), sampling, draws)
    assert torch.equal(choose(logits, dataclasses.replace(sampling, num_ids=IDS), draws), cut)


class Biased(torch.nn.Module):
    """A head whose padding rows win by far."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden):
        return torch.nn.functional.pad(hidden @ self.weight[:IDS].mT, (0, 3), value=100.0)


@pytest.fixture
def padded(student, monkeypatch):
    monkeypatch.setattr(student, "lm_head", Biased(student.lm_head))
    return student


def test_generating_never_yields_an_id_that_is_no_token(padded, teacher, monkeypatch):
    assert min(stream_tokens(padded, [1, 2, 3], Sampling(seed=1, max_tokens=20))) >= IDS
    sampling = Sampling(seed=1, num_ids=IDS, max_tokens=20)
    rows = list(stream_rows(padded, [[1, 2, 3], [4]], sampling))
    assert max(max(row) for row in rows) < IDS
    seen, stream = [], stream_tokens

    def watched(*arguments, **keywords):
        for token in stream(*arguments, **keywords):
            seen.append(token)
            yield token

    monkeypatch.setattr("radlads.inference.generate.stream_tokens", watched)
    tokenizer = load_tokenizer(teacher, tiny.VOCAB)
    assert num_ids(tokenizer) == IDS
    list(stream_text(padded, tokenizer, "abc", Sampling(seed=1, max_tokens=20), frozenset()))
    assert len(seen) == 20 and max(seen) < IDS


@pytest.mark.parametrize("defaults", [None, {"eos_token_id": [256, 255], "suppress_tokens": [9]}])
def test_an_export_has_transformers_generate_suppress_them(student, teacher, tmp_path, defaults):
    folder = tiny.teacher_folder(tmp_path / "teacher")
    (folder / "generation_config.json").unlink()
    if defaults is not None:
        (folder / "generation_config.json").write_text(json.dumps(defaults))
    export(student, folder, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config = loaded.generation_config
    assert config.suppress_tokens == ([9] if defaults else []) + [257, 258, 259]
    assert config.eos_token_id == (defaults or {"eos_token_id": 256})["eos_token_id"]
    loaded.lm_head = Biased(loaded.lm_head)
    for do_sample in (False, True):
        drawn = loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=do_sample, eos_token_id=None)
        assert drawn.max() < IDS


def test_an_embedding_without_padding_is_exported_as_it_was(tmp_path):
    folder = tiny.teacher_folder(tmp_path / "teacher", vocab_size=IDS)
    before = (folder / "generation_config.json").read_bytes()
    model = tiny.stage_config(tmp_path, "align").model
    export(build_student(open_teacher(folder), model)[0], folder, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == before


def logits_with_padding(value):
    """Teacher and student whose 3 padding logits are `value`, as an untrained row's logits stay near 0."""
    torch.manual_seed(5)
    real = [4 * torch.randn(2, 7, IDS, dtype=torch.float64) + 15 for _ in range(2)]
    return [torch.nn.functional.pad(logits, (0, 3), value=value) for logits in real]


def test_padding_rows_add_nothing_to_kl_that_could_be_seen():
    teacher, student = logits_with_padding(0.0)
    over_all, over_real = kl_divergence(teacher, student), kl_divergence(teacher[..., :IDS], student[..., :IDS])
    assert over_real > 10
    torch.testing.assert_close(over_all, over_real, rtol=1e-5, atol=0)


def test_kl_teaches_the_student_to_leave_padding_rows_alone():
    """A student that likes them is worse, and the gradient of their rows of the head lowers them."""
    teacher, student = logits_with_padding(0.0)
    likes = student.clone()
    likes[..., IDS:] = 25.0
    assert kl_divergence(teacher, likes) > kl_divergence(teacher, student) + 1
    hidden = torch.ones(2, 7, 1)  # so that a row of the head is its logit
    rows = [logits[0, :1].mT.float() for logits in (teacher, likes)]
    head, labels = torch.nn.Parameter(rows[1]), torch.zeros(2, 7, dtype=torch.long)
    head_loss(hidden, head, labels, teacher_hidden_BTC=hidden, teacher_head_VC=rows[0], kl_weight=1.0).backward()
    assert torch.isfinite(head.grad).all()
    assert (head.grad[IDS:] > 1e-2).all()
