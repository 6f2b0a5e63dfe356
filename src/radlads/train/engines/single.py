"""One process, which shares nothing out."""

from typing import Any

from radlads.train.engines.replicated import Replicated


class SingleProcess(Replicated):
    """The engine of a process that is alone."""

    records_graphs = True

    def trainer_arguments(self) -> dict[str, Any]:
        """See Engine. Which strategy that is, Lightning knows."""
        return {"devices": 1}

    def reduce_gradients(self) -> None:
        """See Engine. They are."""
