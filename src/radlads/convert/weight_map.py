"""Where every weight comes from and goes to: a table with one row per teacher tensor and student parameter."""

import fnmatch
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

Action = Literal["copy", "transform", "fresh", "drop"]

_FROM_TEACHER = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
FRESH_PARAMETERS = {
    "qwen2": (),
    "rad_rwkv6": ("time_maa_*", "time_decay*", "gate.weight", "g1", "g2", "ln_x.*"),
    "rad_rwkv7": ("w[012]", "a[012]", "v[012]", "k_[ka]", "gate.weight", "g1", "g2", "ln_x.*"),
}


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
    rows += [Row("drop", name, None) for name in sorted(teacher_names - used) if _may_drop(name, tied, reinit_att)]
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
        mixer = config.time_mixers[layer]
        shared = part.split(".")[0] in _FROM_TEACHER
        own = not shared and (mixer not in FRESH_PARAMETERS or _matches(part, FRESH_PARAMETERS[mixer]))
        if own or (shared and reinit_att and mixer != "qwen2"):
            return Row("fresh", None, name)
    if name in teacher_names:
        return Row("copy", name, name)
    if tied and name == "lm_head.weight":
        return Row("transform", "model.embed_tokens.weight", name)
    raise ValueError(f"the teacher has no {name}: its weights are incomplete, or it is not a supported model")


def _may_drop(name: str, tied: bool, reinit_att: bool) -> bool:
    layer, part = _split_mixer_name(name)
    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
        return True
    return reinit_att and layer is not None and part.split(".")[0] in _FROM_TEACHER


def _split_mixer_name(name: str) -> tuple[int | None, str]:
    """('model.layers.3.self_attn.q_proj.weight') -> (3, 'q_proj.weight'); (None, '') for what is not in a mixer."""
    words = name.split(".")
    if len(words) > 4 and words[1] == "layers" and words[3] == "self_attn":
        return int(words[2]), ".".join(words[4:])
    return None, ""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
