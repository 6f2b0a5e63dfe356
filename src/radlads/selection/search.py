"""The search: one layer after another is put back, the best of them stays, and again beside it.

Several processes share the students of a round; each runs the common part itself. Leaves files to record.py.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from radlads.config.layer_lists import uniform_layers
from radlads.console import Console
from radlads.model.modeling import RadladsForCausalLM
from radlads.selection.command import Criterion
from radlads.selection.probes import Probe, Values, rank
from radlads.selection.swap import Layers, SwappedStudent
from radlads.train.processes.group import ALONE, Processes


@dataclass(frozen=True)
class Round:
    """What was measured of each candidate beside the layers `kept` before, and which was chosen."""

    kept: Layers
    values: dict[int, Values]
    chosen: int


@dataclass(frozen=True)
class Measured:
    """What was measured of a student that keeps these layers."""

    layers: Layers
    values: Values


@dataclass(frozen=True)
class Selection:
    """What a search found. uniform: layers at equal distances, for each number kept. block_runs: of this process, the
    batches times the student's blocks they ran through."""

    by: Criterion
    none: Values
    rounds: list[Round]
    uniform: list[Measured]
    seconds: float
    block_runs: int

    @property
    def order(self) -> list[int]:
        """The layers in the order they were chosen."""
        return [each.chosen for each in self.rounds]

    @property
    def layers(self) -> Layers:
        """The layers in rising order."""
        return tuple(sorted(self.order))

    @property
    def curve(self) -> list[Measured]:
        """No layer, and the best of each round."""
        best = [Measured(tuple(sorted((*each.kept, each.chosen))), each.values[each.chosen]) for each in self.rounds]
        return [Measured((), self.none), *best]


@torch.no_grad()
def search(
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    probe: Probe,
    *,
    keep: int,
    candidates: Sequence[int],
    console: Console,
    processes: Processes = ALONE,
) -> Selection:
    """Choose `keep` of the candidates, layers of the student that are not softmax. Neither model is changed.

    Both are whole, in evaluation mode, on one device and of one type. Of several processes all have to call this with
    the same. Of candidates that are equally good the first is taken. Raises ValueError unless 1 <= keep <= candidates,
    and if a value is not finite.
    """
    if not 1 <= keep <= len(candidates):
        raise ValueError(f"{keep} layers cannot be kept: the student has {len(candidates)} that are not softmax yet")
    began, swapped = time.monotonic(), SwappedStudent(student, teacher)
    equal = [uniform_layers(candidates, number) for number in range(1, keep + 1)]
    kept: Layers = ()
    rounds: list[Round] = []
    block_runs = 0
    found: dict[Layers, Values] = {}
    for number in range(1, keep + 1):
        beside = {layer: tuple(sorted((*kept, layer))) for layer in candidates if layer not in kept}
        sets = list(dict.fromkeys([*([(), *equal] if number == 1 else []), *beside.values()]))
        told = f"round {number} of {keep}"
        values, runs = _measure(swapped, probe, kept, sets, told, console, processes)
        found |= values
        block_runs += runs
        of_layer = {layer: values[layers] for layer, layers in beside.items()}
        chosen = min(of_layer, key=lambda layer: rank(of_layer[layer], probe.by))
        rounds.append(Round(kept, of_layer, chosen))
        kept = beside[chosen]
        console.line(f"{told}: layer {chosen}, from {in_words(found[rounds[-1].kept])} to {in_words(of_layer[chosen])}")
    uniform = [Measured(layers, found[layers]) for layers in equal]
    return Selection(probe.by, found[()], rounds, uniform, time.monotonic() - began, block_runs)


def _measure(
    swapped: SwappedStudent,
    probe: Probe,
    kept: Layers,
    sets: Sequence[Layers],
    told: str,
    console: Console,
    processes: Processes,
) -> tuple[dict[Layers, Values], int]:
    """The values of students that keep these layers, measured from one trace of that which keeps `kept`; and how many
    blocks ran here."""
    own = sets[processes.rank :: processes.size]
    totals: dict[Layers, torch.Tensor] = {}
    began = time.monotonic()
    for number, batch in enumerate(probe.asked(swapped.student, swapped.teacher), start=1):
        trace = swapped.trace(batch.tokens, kept)
        for layers in own:
            sums = batch.sums(swapped.hidden(trace, layers))
            totals[layers] = totals[layers] + sums if layers in totals else sums
        seconds = time.monotonic() - began
        console.progress(f"{told}: {len(sets)} students, batch {number} of {len(probe)} ({seconds:.0f} s)")
    measured = {layers: probe.values(sums) for layers, sums in totals.items()}
    everyone = {layers: values for each in processes.gather(measured) for layers, values in each.items()}
    for layers, values in everyone.items():
        if not all(map(math.isfinite, values.values())):
            who = f"the student with softmax in layers {listed(layers)}" if layers else "the student"
            raise ValueError(
                f"{in_words(values)} was measured of {who}, so that nothing can be chosen: check that student and "
                "teacher are sound, with radlads eval, or measure with --device cpu, in fp32"
            )
    return everyone, len(probe) * swapped.num_runs(kept, own)


def listed(layers: Sequence[int]) -> str:
    """Layers as model.softmax_layers names them."""
    return ",".join(map(str, layers))


def in_words(values: Values) -> str:
    """Values with their names."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
