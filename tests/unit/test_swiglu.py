"""The channel mixer: its own backward, and stepping aside for a layer that is more than a product."""

import pytest
import torch
import torch.nn.functional as F

from radlads.model.configuration import RadladsConfig
from radlads.model.swiglu import SwiGLU


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return SwiGLU(RadladsConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1), 0)


def test_gradients_are_autograds(mixer):
    x = torch.randn(2, 5, 16, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    plain = mixer.down_proj(F.silu(mixer.gate_proj(x)) * mixer.up_proj(x))
    expected = torch.autograd.grad(plain.square().sum(), wanted)
    found = torch.autograd.grad(mixer(x).square().sum(), wanted)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)


def test_hooks_on_the_last_layer_are_called(mixer):
    calls = []
    mixer.down_proj.register_forward_hook(lambda *_: calls.append(1))
    mixer(torch.randn(1, 3, 16, requires_grad=True))
    assert calls == [1]
