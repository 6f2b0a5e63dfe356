"""The fused decoding kernels in Triton's interpreter, against the model's own forward. Run by test_decoder.py."""

import pytest
import torch
from interpreter import runtime_loops  # noqa: F401
from test_decoder import PROMPTS, VOCAB, full_logits, logits_after, perturbed
from tolerances import SPLIT, relative_error

from radlads.inference.fused_launches import Launch, Launches
from radlads.inference.fused_step import FusedStep
from radlads.train.optimizers.adamw import BLOCK, update_

pytestmark = pytest.mark.usefixtures("runtime_loops")

BALANCED = {"balance_state": True, "groupnorm_att": False, "use_rope": True, "gate_rank_type": 2}
GROUP_NORMED = {"balance_state": False, "groupnorm_att": True, "use_rope": True, "gate_rank_type": 2}
VARIANTS = {
    "balanced": BALANCED,
    "group-normed": GROUP_NORMED,
    "no-rope-full-gate": {**BALANCED, "use_rope": False, "gate_rank_type": 1},
    "no-gate-no-bias": {**GROUP_NORMED, "gate_rank_type": 0, "attention_bias": False},
    "balanced-and-normed": {**BALANCED, "groupnorm_att": True},
    "neither": {**GROUP_NORMED, "groupnorm_att": False},
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


def test_a_fused_step_follows_weights_that_change_in_place():
    model, prompts = perturbed(**BALANCED), PROMPTS[:3]
    step = FusedStep(model, 3, launches(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    step.follow_weights()
    continuation = torch.randint(VOCAB, (2, 3))
    expected = full_logits(model, prompts, continuation)
    assert relative_error(logits_after(step, model, prompts, continuation), expected) < SPLIT


def test_the_adamw_kernel_does_what_torch_does():
    torch.manual_seed(0)
    parameter, gradient = torch.randn(2 * BLOCK).bfloat16(), torch.randn(2 * BLOCK).bfloat16()
    state = {"exp_avg": torch.randn(2 * BLOCK).bfloat16(), "exp_avg_sq": torch.rand(2 * BLOCK).bfloat16()}
    expected = torch.nn.Parameter(parameter.float())
    expected.grad = gradient.float() / 4
    keys = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([expected], **keys)
    optimizer.state[expected] = {"step": torch.tensor(6.0), **{name: x.float() for name, x in state.items()}}
    optimizer.step()
    state["step"] = torch.tensor(7.0)
    before = {name: x.clone() for name, x in (state | {"parameter": parameter}).items()}
    update_(parameter, gradient, state, keys, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(1.0))
    assert all(torch.equal(x, before[name]) for name, x in (state | {"parameter": parameter}).items())
    update_(parameter, gradient, state, keys, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0))
    moments = optimizer.state[expected]
    for found, wanted in [(parameter, expected), *((state[name], moments[name]) for name in ("exp_avg", "exp_avg_sq"))]:
        # The interpreter cuts bf16 off where a GPU rounds
        torch.testing.assert_close(found.float(), wanted.detach(), rtol=2**-7, atol=1e-6)
