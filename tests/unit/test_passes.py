"""Where in a window's passes the engine is asked, recorded as a CUDA graph or not."""

from types import SimpleNamespace

import pytest
import torch

from radlads.config.schema import TrainConfig
from radlads.train import passes
from radlads.train.engines.single import SingleProcess
from radlads.train.processes.group import ALONE


class Asked:
    """An engine that notes what it is asked, with windows of so many batches."""

    def __init__(self, batches, notes):
        self.train, self._notes = SimpleNamespace(accumulate_grad_batches=batches), notes

    def begin_last_micro_batch(self):
        self._notes.append("last")

    def reduce_gradients(self):
        self._notes.append("sum")


class Recorded:
    """As GraphedPasses, but that it calls what it would replay; brackets say what is in the graph."""

    def __init__(self, run, student, teacher, *, accumulates):
        self._run, self._notes = run, student
        self._notes.append(f"accumulates {accumulates}")

    def __call__(self, tokens):
        self._notes.append("[")
        parts = self._run(tokens)
        self._notes.append("]")
        return parts


@pytest.fixture
def notes(monkeypatch):
    noted = []
    monkeypatch.setattr(passes, "GraphedPasses", Recorded)
    monkeypatch.setattr(passes, "backward_parts", lambda *given, backward: noted.append("passes") or [])
    return noted


def run(notes, *, batches, graphed):
    own = passes.Passes(None, notes, None, Asked(batches, notes))
    own.graphed = graphed
    for number in range(batches):
        own.run(torch.zeros(1, 9), ends_window=number == batches - 1, backward=torch.Tensor.backward)
    return notes


def test_gradients_are_summed_once_a_window(notes):
    assert run(notes, batches=2, graphed=False) == ["passes", "last", "passes", "sum"]


def test_a_window_of_one_batch_is_recorded_with_its_sums(notes):
    assert run(notes, batches=1, graphed=True) == ["accumulates False", "[", "last", "passes", "sum", "]"]


def test_sums_follow_a_graph_that_is_replayed_for_each_batch(notes):
    assert run(notes, batches=2, graphed=True) == ["accumulates True", "[", "passes", "]", "[", "passes", "]", "sum"]


def test_models_are_where_they_were_whatever_happens_while_they_train():
    class Moved(torch.nn.Linear):
        device = torch.device("cpu")
        dtype = torch.float32

        def to(self, *where):
            moves.append((self.name, *where))
            return self

    moves = []
    student, teacher = Moved(1, 1), Moved(1, 1).requires_grad_(False)
    student.name, teacher.name = "student", "teacher"
    engine = SingleProcess(TrainConfig(precision="bf16-true"), ALONE)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with (
        pytest.raises(torch.OutOfMemoryError),
        engine.placed(student, teacher, gpu, "32-true") as working,
    ):
        assert working is teacher
        raise torch.OutOfMemoryError
    there = [("student", gpu, torch.bfloat16), ("teacher", gpu, torch.bfloat16)]
    assert moves == [*there, ("teacher", cpu), ("student", cpu)]
