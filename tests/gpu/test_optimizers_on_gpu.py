"""Every optimiser takes its steps on a GPU; those from packages that are not installed are skipped."""

import pytest
import tiny
import torch
from gpu_comparison import DRY_RUN

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
    losses = tiny.losses_by(optimizer, teacher, tmp_path, torch.empty(0, device=device, dtype=dtype))
    assert losses[-1] < losses[0] - 0.2
