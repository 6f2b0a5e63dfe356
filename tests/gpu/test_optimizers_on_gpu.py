"""Every optimiser takes its steps on a GPU; those from packages that are not installed are skipped."""

import pytest
import tiny
import torch
from gpu_comparison import DRY_RUN

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.train.optim import build_optimizers
from radlads.train.step import optimizer_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DRY_RUN, reason="says nothing without a GPU")]

PACKAGES = {
    "adamw": "torch",
    "muon": "torch",
    "adamwschedulefree": "schedulefree",
    "lion": "lion_pytorch",
    "adam8bit": "bitsandbytes",
    "dsfusedadamw": "deepspeed",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", PACKAGES)
def test_the_loss_falls(device, teacher, tmp_path, optimizer, dtype):
    pytest.importorskip(PACKAGES[optimizer])
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": optimizer, "train.lr_init": 1e-3})
    torch.manual_seed(0)
    student = build_student(open_teacher(teacher), config.model)[0].to(device, dtype).train()
    optimizers = build_optimizers(student, config.train)
    tokens = (torch.arange(80, device=device).view(2, 40) * 7) % tiny.VOCAB
    losses = []
    for _ in range(12):
        loss = student(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer_step(optimizers, student.parameters(), count=1, clip_val=1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
