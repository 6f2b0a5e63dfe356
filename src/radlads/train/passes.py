"""A micro-batch's passes, forward and backward, and where in them the engine adds gradients up."""

import functools
from collections.abc import Callable

import torch

from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.cuda_graph import GraphedPasses
from radlads.train.engines.engine import Engine
from radlads.train.optimizers.step import PartSum, backward_parts


class Passes:
    """The passes of `stage` on a student and the teacher that it learns from, which may be replaced.

    graphed: whether they are recorded as a CUDA graph (see GraphedPasses); set before the first.
    """

    def __init__(self, stage: Stage, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, engine: Engine):
        self._stage, self._student, self.teacher, self._engine = stage, student, teacher, engine
        # A window of one batch is recorded whole, so that gradients travel while a replay still makes others
        self._records_window = engine.train.accumulate_grad_batches == 1
        self.graphed = False
        self._graph: GraphedPasses | None = None

    def run(
        self, tokens: torch.Tensor, *, ends_window: bool, backward: Callable[[torch.Tensor], object]
    ) -> list[PartSum]:
        """Add the gradients of a micro-batch [B, T + 1]; where a window ends, they are those of all processes then.

        backward: what a part's objective is given to, except in a graph.
        """
        if not self.graphed:
            return self._run(tokens, ends_window=ends_window, backward=backward)
        if self._graph is None:
            passes = functools.partial(self._run, ends_window=self._records_window, backward=torch.Tensor.backward)
            accumulates = not self._records_window
            self._graph = GraphedPasses(passes, self._student, self.teacher, accumulates=accumulates)
        parts = self._graph(tokens)
        if ends_window and not self._records_window:
            self._engine.reduce_gradients()
        return parts

    def forget_graph(self) -> None:
        """Let the recorded graph and its memory go."""
        self._graph = None

    def _run(
        self, tokens: torch.Tensor, *, ends_window: bool, backward: Callable[[torch.Tensor], object]
    ) -> list[PartSum]:
        if ends_window:
            self._engine.begin_last_micro_batch()
        parts = backward_parts(self._stage, self._student, self.teacher, tokens, backward=backward)
        if ends_window:
            self._engine.reduce_gradients()
        return parts
