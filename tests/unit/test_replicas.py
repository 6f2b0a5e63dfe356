"""Gradients on their way while backward runs: each once, and hooks for one micro-batch alone."""

from types import SimpleNamespace

import pytest
import torch

from radlads.train.engines import replicas
from radlads.train.engines.replicas import GradientSums
from radlads.train.processes.group import ALONE


@pytest.fixture
def parameter(monkeypatch):
    monkeypatch.setattr(replicas, "LARGE_NUMBERS", 4)
    return torch.nn.Parameter(torch.ones(4))


def test_a_gradient_that_comes_twice_is_noticed(parameter):
    sums = GradientSums({"w": parameter}, ALONE)
    parameter.sum().backward()
    sums.begin_last()
    parameter.sum().backward()
    with pytest.raises(ValueError, match=r"w got a gradient from two parts of the loss.*train on one device"):
        parameter.sum().backward()


def test_between_the_last_micro_batches_of_steps_nothing_is_hooked(parameter, monkeypatch):
    sent = []

    def add_up(gradient, **how):
        sent.append(gradient)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(replicas.dist, "all_reduce", add_up)
    sums = GradientSums({"w": parameter}, ALONE)
    for _ in range(2):
        parameter.sum().backward()
        sums.begin_last()
        parameter.sum().backward()
        sums.finish()
    assert len(sent) == 2
    for _ in range(2):
        parameter.sum().backward()
    assert len(sent) == 2
