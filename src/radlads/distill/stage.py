"""What a stage is: which parameters train, what it needs of the teacher, and its loss, part by part."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from radlads.model.modeling import RadladsForCausalLM

Trainable = Literal["mixer", "decay", "all", "no_softmax"]


@dataclass(frozen=True)
class LossPart:
    """One term of a stage's loss over a batch.

    objective: scalar to run backward on, a sum over tokens; None: another part's objective holds it. sum: the part's
    value, detached. count: what to divide sums by.
    The stage's loss is the sum of all parts' sums over the sum of all parts' counts, over any number of batches, times
    the stage's share. is_last: whether no other part of the same sequences follows.
    """

    name: str
    objective: torch.Tensor | None
    sum: torch.Tensor
    count: int
    is_last: bool = True


class Stage(Protocol):
    """A training stage."""

    name: str
    needs_teacher: bool
    trainable: Trainable

    def part_names(self, student: RadladsForCausalLM) -> list[str]:
        """The names that parts may have, in one order for all processes."""
        ...

    def share(self, student: RadladsForCausalLM) -> float:
        """What the mean over the parts is multiplied by, in (0, 1]: 1 unless something counts that has no part."""
        ...

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """Yield the loss of tokens [B, T + 1] part by part.

        When training, run backward on each part's objective before asking for the next: it frees that part's graph,
        and a later part may build on the gradients.
        """
        ...


def is_trainable(name: str, student: RadladsForCausalLM, trainable: Trainable) -> bool:
    """Whether the student's parameter of that name trains.

    mixer: the recurrent layers' time mixers. decay: decay and token-shift parameters alone. all: everything.
    no_softmax: everything but the attention of layers that keep softmax.
    """
    if trainable == "all":
        return True
    if trainable == "no_softmax":
        return is_mixer_parameter(name, student) or not is_attention_parameter(name)
    if not is_mixer_parameter(name, student):
        return False
    layer, own_name = int(name.split(".")[2]), name.split(".", 4)[4]
    patterns = student.config.mixer_class(layer).decay_and_shift
    return trainable == "mixer" or any(fnmatch.fnmatchcase(own_name, pattern) for pattern in patterns)


def is_mixer_parameter(name: str, student: RadladsForCausalLM) -> bool:
    """Whether the parameter belongs to a recurrent layer's time mixer."""
    return is_attention_parameter(name) and int(name.split(".")[2]) in student.config.recurrent_layers


def is_attention_parameter(name: str) -> bool:
    """Whether the parameter belongs to a layer's time mixer, recurrent or softmax."""
    words = name.split(".")
    return len(words) > 4 and words[3] == "self_attn"
