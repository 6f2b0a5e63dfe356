"""Parts of a partitioned model are whole when they are read, forward and backward, and only one of them is."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from radlads.model.whole_parameters import Turns, call_whole, turns_of, whole


class Part(nn.Module):
    """Like a block: hands its second input through, or makes it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x, first):
        y = self.inner(x)
        return (y, y * 2) if first is None else (y + first, first)


class Kept:
    """Stands in for DeepSpeed: a parameter's values are NaN unless it is gathered, also for the backward pass."""

    def __init__(self, model):
        self.values = {parameter: parameter.detach().clone() for parameter in model.parameters()}
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.order = []
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    @contextmanager
    def gather(self, parameters):
        self.order.append(self.names[parameters[0]].partition(".")[0])
        for parameter in parameters:
            parameter.data.copy_(self.values[parameter])
        yield
        for parameter in parameters:
            parameter.data.fill_(torch.nan)


def loss_of(head, hidden):
    return (hidden @ head.weight.t()).square().sum()


def run(model):
    hidden, first = model[0](torch.ones(2, 4, requires_grad=True), None)
    for part in model[1:3]:
        hidden, first = part(hidden, first)
    loss = call_whole(model[3], loss_of, hidden)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleList([Part(), Part(), Part(), nn.Linear(4, 4, bias=False)])


def test_losses_and_gradients_are_those_of_whole_parameters(model):
    expected = run(model)
    model.zero_grad()
    kept = Kept(model)
    turns = Turns(model[:3], [model[3]], kept.gather)
    found = run(model)
    assert found[0].equal(expected[0])
    assert all(a.equal(b) for a, b in zip(found[1], expected[1], strict=True))
    assert kept.order == ["0", "1", "2", "3", "2", "1", "0"]
    turns.end()
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_reading_makes_whole_until_another_part_is(model):
    kept = Kept(model)
    turns = Turns(model[:3], [model[3]], kept.gather)
    with whole(model[3]):
        assert not model[3].weight.isnan().any()
    with whole(model[1]), torch.no_grad():
        assert model[3].weight.isnan().all()
        assert not model[1].inner(torch.ones(4)).isnan().any()
    turns.let_go()
    assert turns_of(model[1]) is None
    seen = list(kept.order)
    assert model[1](torch.ones(4), None)[0].isnan().all()
    assert kept.order == seen
