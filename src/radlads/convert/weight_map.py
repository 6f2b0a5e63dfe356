"""Where every weight comes from and goes to: a table with one row per teacher tensor and student parameter."""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from radlads.checkpoint.strict_loading import copy_checked
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.recurrent_mixer import RecurrentMixer
from radlads.model.registry import build_time_mixer
from radlads.model.time_mixer import TimeMixer

Action = Literal["copy", "transform", "fresh", "drop"]


@dataclass(frozen=True)
class Row:
    """One weight's way.

    copy: teacher to student as it is. transform: the same tensor in a second role (an untied head).
    fresh: the student's own initial value (teacher None). drop: not used by the student (student None)."""

    action: Action
    teacher: str | None
    student: str | None


def table(
    teacher_names: set[str], student_names: set[str], config: RadladsConfig, *, tied: bool, reinit_att: bool
) -> list[Row]:
    """The rows for these names; every name of either side stands in exactly one row (as a copy's or fresh target, or
    as a copy's or drop's source). Raises ValueError that names what has no row.

    tied: the teacher's head is its embedding. reinit_att: recurrent mixers keep their own initial projections and norms
    of queries and keys (an ablation).
    """
    rows = [_row(name, teacher_names, config, tied=tied, reinit_att=reinit_att) for name in sorted(student_names)]
    used = {row.teacher for row in rows}
    unused = sorted(teacher_names - used)
    rows += [Row("drop", name, None) for name in unused if _may_drop(name, config, tied=tied, reinit_att=reinit_att)]
    if left := sorted(teacher_names - {row.teacher for row in rows}):
        raise ValueError(
            f"the teacher's {left[0]} ({len(left)} such) has no place in the student: is it a supported model?"
        )
    return rows


def transfer(
    weights: Mapping[str, torch.Tensor],
    student: RadladsForCausalLM,
    origin: object,
    *,
    tied: bool,
    reinit_att: bool = False,
) -> Counter[Action]:
    """Fill the student by the table: the teacher's weights, and for what is fresh the values that a mixer's constructor
    sets, layer by layer. Return how many rows there were of each action.

    Raises ValueError for a tensor that is missing, left over, of another shape, or not finite.
    """
    parameters = dict(student.named_parameters())
    rows = table(set(weights), set(parameters), student.config, tied=tied, reinit_att=reinit_att)
    for row in rows:
        if row.teacher is not None and row.student is not None:
            copy_checked(parameters[row.student], weights[row.teacher], row.teacher, str(origin))
    fresh = [row.student for row in rows if row.action == "fresh" and row.student is not None]
    for layer, names in itertools.groupby(sorted(fresh, key=_layer_of), key=_layer_of):
        # Built anew, on the CPU: the student's own parameters may be spread over processes
        mixer = build_time_mixer(student.config, layer)
        if reinit_att and isinstance(mixer, RecurrentMixer):
            mixer.reset_projections()
        own = dict(mixer.named_parameters())
        for name in names:
            copy_checked(parameters[name], own[_split_mixer_name(name)[1]].detach(), name, "the mixer's initial values")
    return Counter(row.action for row in rows)


def _layer_of(name: str) -> int:
    layer, _ = _split_mixer_name(name)
    assert layer is not None
    return layer


def _row(name: str, teacher_names: set[str], config: RadladsConfig, *, tied: bool, reinit_att: bool) -> Row:
    layer, part = _split_mixer_name(name)
    if layer is not None:
        mixer = config.mixer_class(layer)
        if part.split(".")[0] not in mixer.from_teacher or (reinit_att and not mixer.state_grows):
            return Row("fresh", None, name)
    if name in teacher_names:
        return Row("copy", name, name)
    if tied and name == "lm_head.weight":
        return Row("transform", "model.embed_tokens.weight", name)
    raise ValueError(f"the teacher has no {name}: its weights are incomplete, or it is not a supported model")


def _may_drop(name: str, config: RadladsConfig, *, tied: bool, reinit_att: bool) -> bool:
    layer, part = _split_mixer_name(name)
    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
        return True
    if layer is None or part.split(".")[0] not in TimeMixer.from_teacher:
        return False
    return reinit_att or part.split(".")[0] not in config.mixer_class(layer).from_teacher


def _split_mixer_name(name: str) -> tuple[int | None, str]:
    """('model.layers.3.self_attn.q_proj.weight') -> (3, 'q_proj.weight'); (None, '') for what is not in a mixer."""
    words = name.split(".")
    if len(words) > 4 and words[1] == "layers" and words[3] == "self_attn":
        return int(words[2]), ".".join(words[4:])
    return None, ""
