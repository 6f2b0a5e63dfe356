"""Steps whose loss leaps: left out on the device, before they change a weight; too many in a row end the stage.

The usual loss is an average of the steps that were not left out, of all at first and then with a memory of
MEMORY_STEPS. Everything that the guard knows is four numbers, which checkpoints hold.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from radlads.train.checkpoints.snapshots import checkpoints_in

# Before so many steps nothing is usual yet
WARMUP_STEPS = 20
MEMORY_STEPS = 50
# A bad batch is one; when the third follows it is the weights
MOST_IN_A_ROW = 3
NAMES = ("usual_loss", "usual_steps", "spikes_in_a_row", "spikes")
"""What the state's numbers are called in a row of metrics: the average and how many steps are in it; steps left out,
one after the other until now, and in all."""


def judged(loss: torch.Tensor, state: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a step's loss is more than `factor` times the usual one, and the state after it.

    All on the device, in the order of NAMES. A step that is left out does not count among the usual ones.
    """
    usual, steps, in_a_row, spikes = state.unbind()
    is_spike = (steps >= WARMUP_STEPS) & (loss > factor * usual)
    share = (1 / (steps + 1)).clamp(min=1 / MEMORY_STEPS)
    after = torch.stack([usual + share * (loss - usual), steps + 1, torch.zeros_like(in_a_row), spikes])
    left_out = torch.stack([usual, steps, in_a_row + 1, spikes + 1])
    return is_spike, torch.where(is_spike, left_out, after)


class SpikeGuard:
    """The guard of a stage that trains in `stage_folder`.

    say: told of every step that is left out. numbers: the state's, of the run that is gone on with.
    """

    def __init__(self, factor: float, stage_folder: Path, say: Callable[[str], None], numbers: Sequence[float] = ()):
        self._factor, self._folder, self._say = factor, stage_folder, say
        self.state = torch.tensor(list(numbers) or [0.0] * len(NAMES), dtype=torch.float32)

    def is_spike(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether to leave the step of this loss out, a boolean on its device; counts it. Never waits for the device
        after the first call."""
        is_spike, self.state = judged(loss.float(), self.state.to(loss.device), self._factor)
        return is_spike

    def see(self, metrics: Mapping[str, float]) -> None:
        """Say so if the step of these metrics was left out. Raises ValueError if it was the last of too many."""
        step, in_a_row = int(metrics["optimizer_step"]), int(metrics["spikes_in_a_row"])
        if not in_a_row:
            return
        leapt = (
            f"the loss is {metrics['loss']:.4g} at step {step}, more than train.spike_factor {self._factor:g} times "
            f"the usual {metrics['usual_loss']:.4g}"
        )
        if in_a_row < MOST_IN_A_ROW:
            self._say(f"{leapt}: the step is left out")
            return
        # The steps left out changed nothing, so what is wrong was there before them, maybe by the update just before
        last_update = step - in_a_row
        earlier = [path for path in checkpoints_in(self._folder) if int(path.name[5:]) < last_update]
        again = (
            f"go on from before with --train.resume {earlier[-1]}" if earlier else "start over (no checkpoint is older)"
        )
        raise ValueError(
            f"{leapt}, as were the {in_a_row - 1} before it: {again} and lower learning rates, or a larger "
            "train.spike_factor if the data are so"
        )
