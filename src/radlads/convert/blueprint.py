"""A model that is yet to be built: whoever builds it decides where its parameters are, and in how many pieces."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from radlads.checkpoint.model_folder import open_checked, unfilled_model
from radlads.checkpoint.strict_loading import load_strict
from radlads.checkpoint.weights import StoredWeights
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM


@dataclass(frozen=True)
class Blueprint:
    """A model's configuration, and what fills every parameter of such a model, one tensor after another.

    fill: returns how many weights came which way (see weight_map.transfer), empty for a model that is merely loaded. It
    fills parameters that are sharded too, and then every process has to call it. stored: the weights that it is merely
    loaded from, by the names of its parameters; None for a model that is set up.
    """

    config: RadladsConfig
    fill: Callable[[RadladsForCausalLM], Counter]
    stored: StoredWeights | None = None

    def build(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[RadladsForCausalLM, Counter]:
        """The model, whole, and what fill returned. Elsewhere than on the CPU, that has a tensor at a time."""
        model = unfilled_model(self.config, dtype, device)
        return model, self.fill(model)


def stored_blueprint(folder: Path) -> Blueprint:
    """The model of a folder, which is opened and checked now (see model_folder.load_model)."""
    stored = open_checked(folder)
    return blueprint_of(stored.config, stored.used, folder)


def blueprint_of(config: RadladsConfig, weights: StoredWeights, origin: Path) -> Blueprint:
    """A model that has these weights and no others."""

    def fill(model: RadladsForCausalLM) -> Counter:
        load_strict(model, weights, origin)
        return Counter()

    return Blueprint(config, fill, weights)
