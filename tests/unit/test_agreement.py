"""Agreement by position: the definitions, at every position, in bins, and which windows count."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.evaluation.agreement import agreement_by_position
from radlads.evaluation.perplexity import spread_windows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))
    tiny.corpus(folder / "train", num_tokens=2000)
    return tiny.moved_student(folder, folder), build_teacher(open_teacher(folder)), BinIdxReader(folder / "train")


def test_bins_are_means_of_loss_kl_and_agreement_at_their_positions(models):
    student, teacher, corpus = models
    found = agreement_by_position(student, teacher, corpus, context_tokens=37, edges=(0, 5, 37), max_tokens=111)
    tokens = torch.stack(list(spread_windows(corpus, 37, 111)))
    with torch.no_grad():
        ours, theirs = student(tokens[:, :-1]).logits, teacher(tokens[:, :-1]).logits
    loss = F.cross_entropy(ours.transpose(1, 2), tokens[:, 1:], reduction="none")
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    for each, where in zip(found, (slice(0, 5), slice(5, 37)), strict=True):
        wanted = [values[:, where].mean().item() for values in (loss, kl, same)]
        assert [each.loss, each.kl, each.top1] == pytest.approx(wanted, rel=1e-5)
        assert each.num_tokens == 3 * (each.end - each.first)


def test_a_teacher_agrees_with_itself(models):
    _, teacher, corpus = models
    (bin_,) = agreement_by_position(teacher, teacher, corpus, context_tokens=32, edges=(0, 32), batch_windows=2)
    assert bin_.kl == pytest.approx(0, abs=1e-6)
    assert bin_.top1 == 1


def test_edges_outside_the_window_are_refused(models):
    student, teacher, corpus = models
    with pytest.raises(ValueError, match="must rise"):
        agreement_by_position(student, teacher, corpus, context_tokens=32, edges=(0, 64))
