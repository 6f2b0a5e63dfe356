"""Stage 4 on a GPU: the student's rows by recorded steps that follow its weights, and a stage that learns from them."""

import csv
from fractions import Fraction

import pytest
import tiny
import torch
from gpu_comparison import DEVICE, DRY_RUN

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.data.chat_rows import ConversationRows, Conversations
from radlads.train.fit import run_stage
from radlads.train.on_policy import OnPolicy
from radlads.train.processes.group import ALONE

pytestmark = pytest.mark.gpu

CONTEXT = 24
OWN_ROWS = {"on_policy_share": 0.5, "on_policy_every_steps": 2, "on_policy_max_tokens": 6}


def config_of(data, **keys):
    own = {"accelerator": "cpu" if DRY_RUN else "gpu", "micro_bsz": 4, "my_exit_tokens": CONTEXT * 4 * 12}
    keys = {f"train.{key}": value for key, value in (own | OWN_ROWS | keys).items()}
    return tiny.stage_config(data, "instruct", **{"model.ctx_len": CONTEXT}, **keys)


@pytest.mark.parametrize("rows", [8, 400], ids=["few", "many"])
def test_recorded_steps_follow_the_students_weights(teacher, tmp_path, rows):
    """Few rows run in fused kernels where Triton is, whose packed weights are partly copies; many in the blocks."""
    tiny.chat_corpus(tmp_path / "chat")
    train = config_of(tmp_path, on_policy_temperature=0.0).train
    held = [(Conversations(BinIdxReader(tmp_path / "chat"), CONTEXT), Fraction(1))]
    samples = ConversationRows(held, CONTEXT, num_samples=8 * rows, seed=1, on_policy_share=Fraction(1, 2))
    torch.manual_seed(0)
    student = build_student(open_teacher(teacher), config_of(tmp_path).model)[0].to(DEVICE)

    def policy():
        return OnPolicy(train, samples, num_steps=8, sequences=rows, processes=ALONE)

    batch = torch.stack([samples[i] for i in range(2 * rows, 3 * rows)]).to(DEVICE)
    followed = policy()
    before = followed.fill(batch, student, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = followed.fill(torch.stack([samples[i] for i in range(4 * rows, 5 * rows)]).to(DEVICE), student, 4)
    anew = policy().fill(torch.stack([samples[i] for i in range(4 * rows, 5 * rows)]).to(DEVICE), student, 4)
    assert torch.equal(after, anew)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_the_stage_learns(teacher, tmp_path, precision):
    tiny.chat_corpus(tmp_path / "chat")
    config = config_of(tmp_path, precision=precision, lr_init=3e-3, my_exit_tokens=CONTEXT * 4 * 40)
    source = open_teacher(teacher)
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), tmp_path / "run", tiny.Silent(), parent="test")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column in ("teacher_rows", "student_rows"):
        losses = [float(row[column]) for row in rows]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
