"""The fused decoding kernels in Triton's interpreter, against the model's own forward. Run by test_decoder.py."""

import pytest
import torch
from interpreter import runtime_loops  # noqa: F401
from test_decoder import PROMPTS, VOCAB, full_logits, logits_after, perturbed
from tolerances import SPLIT, relative_error

from radlads.inference.fused_step import FusedStep, Launch, Launches

pytestmark = pytest.mark.usefixtures("runtime_loops")

BALANCED = {"balance_state": True, "groupnorm_att": False, "use_rope": True, "gate_rank_type": 2}
GROUP_NORMED = {"balance_state": False, "groupnorm_att": True, "use_rope": True, "gate_rank_type": 2}
VARIANTS = {
    "balanced": BALANCED,
    "group-normed": GROUP_NORMED,
    "no-rope-full-gate": {**BALANCED, "use_rope": False, "gate_rank_type": 1},
    "no-gate-no-bias": {**GROUP_NORMED, "gate_rank_type": 0, "attention_bias": False},
    "head-size-128-tied": {**BALANCED, "head_dim": 128, "tie_word_embeddings": True},
}


def launches(rows):
    """Few and large programs, since each takes its time here: split sums and states in pieces at several rows."""
    whole = Launch(block_n=64, block_k=32, warps=4)
    split = Launch(block_n=64, block_k=32, warps=4, splits=1 if rows == 1 else 2)
    pieces = 128 if rows == 1 else 32
    return Launches(inputs=whole, output=split, gate_up=whole, down=split, head=whole, state_values=pieces)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_kernels_are_the_models_forward(variant, rows):
    model, prompts = perturbed(**VARIANTS[variant]), PROMPTS[:rows]
    continuation = torch.randint(VOCAB, (2, rows))
    expected = full_logits(model, prompts, continuation)
    actual = logits_after(FusedStep(model, rows, launches(rows)), model, prompts, continuation)
    assert relative_error(actual, expected) < SPLIT
