"""Every number of benchmarks/keep_the_teacher.py, each an option of it, and the students that it compares."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from conversion_runs import knob
from python_teacher import TeacherPlan

from radlads.config.layer_lists import layers_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run. The defaults are the Python teacher's."""

    vocab_size: int = knob(8192, "Entries of the Python teacher's tokenizer")
    tokenizer_bytes: int = knob(40_000_000, "Text that this tokenizer is trained on")
    hidden_size: int = knob(512, "Channels of the Python teacher")
    intermediate_size: int = knob(1408, "Channels inside its channel mixers")
    num_layers: int = knob(8, "Its layers")
    head_size: int = knob(64, "Channels of one of its heads")
    key_value_heads: int = knob(2, "Its key/value heads")
    teacher_seconds: float = knob(150.0, "Time for its training, compiling included")
    teacher_tokens: int = knob(0, "Its token budget; 0 = by time")
    teacher_context: int = knob(1024, "Tokens in a sequence for the first 80 % of its training")
    teacher_long_context: int = knob(2048, "Tokens in a sequence for the rest")
    teacher_batch_tokens: int = knob(131_072, "Tokens in a step of its training")
    teacher_lr: float = knob(2e-3, "Its learning rate (Muon, AdamW)")
    align_tokens: int = knob(6_600_000, "Budget of stage 1 in full")
    distill_tokens: int = knob(8_200_000, "Budget of stage 2 in full")
    align_lr: float = knob(1e-3, "Rate of stage 1, the paper's; falls to 1 % of it")
    distill_lr: float = knob(3e-4, "Rate of stage 2; falls to 1 %")
    window_mixer_lr: float = knob(1.5e-4, "Rate of stage 2 for the mixers of a student with windows; falls to 1 %")
    close_lr: float = knob(1e-4, "Rate of stage 2 for a student with windows and kept layers; falls to 1 %")
    close_mixer_lr: float = knob(5e-5, "The same for its mixers; falls to 1 %")
    window_warmup: float = knob(0.1, "Share of stage 2's steps over which the rates of a student with windows rise")
    window_tokens: int = knob(64, "Window")
    sink_tokens: int = knob(4, "Sinks")
    kept_of: int = knob(8, "Of so many layers one is kept as softmax")
    select_tokens: int = knob(16_384, "Tokens of the training text that layers are selected on")
    context: int = knob(512, "Tokens in a sequence")
    batch_tokens: int = knob(8192, "Tokens in a step")
    measure_tokens: int = knob(262_144, "Held-out tokens to measure on, of each kind of text")
    needle_samples: int = knob(40, "Prompts for each length and each of five depths")
    seed: int = knob(1337, "Seed of the teacher, and of each row's first student; the next ones' are the next numbers")

    @property
    def edges(self) -> tuple[int, ...]:
        """Bins of the figures by position: up to the window, then doubling."""
        edges = [0, self.window_tokens]
        while edges[-1] < self.context:
            edges.append(min(2 * edges[-1], self.context))
        return tuple(edges)

    @property
    def needle_lengths(self) -> tuple[int, ...]:
        """Tokens of the prompts: half of what students are trained at, and all of it."""
        return (self.context // 2, self.context)

    def teacher(self, *, compile_layers: bool) -> TeacherPlan:
        """The Python teacher's part."""
        return TeacherPlan(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            head_size=self.head_size,
            key_value_heads=self.key_value_heads,
            context=self.teacher_context,
            long_context=self.teacher_long_context,
            long_share=0.2,
            batch_tokens=self.teacher_batch_tokens,
            seconds=self.teacher_seconds,
            tokens=self.teacher_tokens,
            lr=self.teacher_lr,
            seed=self.seed,
            compile=compile_layers,
        )


TINY = Plan(
    vocab_size=512,
    tokenizer_bytes=200_000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    head_size=16,
    teacher_tokens=20_480,
    teacher_context=64,
    teacher_long_context=256,
    teacher_batch_tokens=1024,
    align_tokens=3072,
    distill_tokens=3072,
    window_tokens=16,
    select_tokens=512,
    context=256,
    batch_tokens=512,
    measure_tokens=2048,
    needle_samples=1,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A student, or with share 0 a model that nobody trained.

    share: of the full budgets. kept_of: of so many layers one is kept as softmax, 0 = none; by: what they are selected
    by, kl or recalled; layers: which ones instead, as model.softmax_layers names them. mixer_lr: stage 2's, for the
    mixers. warmup: the share of stage 2's steps. keys: configuration keys of both stages, with values.
    """

    name: str
    share: float = 0.0
    window_tokens: int = 0
    sink_tokens: int = 0
    kept_of: int = 0
    by: str = "kl"
    layers: str = ""
    align_lr: float = 1e-3
    distill_lr: float = 3e-4
    mixer_lr: float = 3e-4
    warmup: float = 0.025
    keys: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.by not in ("kl", "recalled"):
            raise ValueError(f"row {self.name} has by={self.by}: choose kl or recalled")

    def num_kept(self, num_layers: int) -> int:
        """How many layers are selected."""
        return max(1, num_layers // self.kept_of) if self.kept_of else 0

    def given_layers(self, num_layers: int) -> list[int]:
        """The layers that the row names itself. Raises ValueError for those that do not exist."""
        return layers_of(self.layers, num_layers, f"row {self.name}")


def usual_rows(plan: Plan) -> dict[str, Row]:
    """The rows by name, the ones that take longest first."""
    window = {"window_tokens": plan.window_tokens, "sink_tokens": plan.sink_tokens}
    kept = {"kept_of": plan.kept_of}
    pure = {"align_lr": plan.align_lr, "distill_lr": plan.distill_lr, "mixer_lr": plan.distill_lr}
    careful = {"align_lr": plan.align_lr, "warmup": plan.window_warmup}
    near = careful | {"distill_lr": plan.distill_lr, "mixer_lr": plan.window_mixer_lr}
    close = careful | {"distill_lr": plan.close_lr, "mixer_lr": plan.close_mixer_lr}
    rows: dict[str, dict[str, Any]] = {
        "window": {"share": 1.0} | window | near,
        "paper": {"share": 1.0} | pure,
        "window_third": {"share": 1 / 3} | window | near,
        "window_kept_third": {"share": 1 / 3} | window | kept | close,
        "kept_third": {"share": 1 / 3} | kept | pure,
        "window_kept_tenth": {"share": 0.1} | window | kept | close,
        "teacher": {},
        "teacher_window_untrained": window,
        "window_untrained": window,
    }
    return {name: Row(name=name, **values) for name, values in rows.items()}


def parse_row(text: str, plan: Plan) -> Row:
    """A usual row, or one that differs from it, as in 'window_third:sink_tokens=16,train.optimizer=muon'.

    What differs is a field of Row or a configuration key. Raises ValueError for what is neither.
    """
    base, _, changes = text.partition(":")
    rows = usual_rows(plan)
    if base not in rows:
        raise ValueError(f"there is no row {base!r}: choose from {', '.join(rows)}")
    changed: dict[str, Any] = {"name": text}
    keys = dict(rows[base].keys)
    known = {each.name: type(each.default) for each in fields(Row) if each.name not in ("name", "keys")}
    for part in filter(None, re.split(r",(?=[a-z_.0-9]+=)", changes)):
        name, equals, value = part.partition("=")
        if not equals or (name not in known and not name.startswith(("train.", "model."))):
            raise ValueError(f"row {text!r} has {part!r}: write FIELD=VALUE with one of {', '.join(known)}, or a key")
        if "." in name:
            keys[name] = value
            continue
        try:
            changed[name] = known[name](value)
        except ValueError:
            raise ValueError(f"row {text!r} has {part!r}, whose value is no {known[name].__name__}") from None
    row = replace(rows[base], **changed, keys=tuple(keys.items()))
    if rows[base].share and not 0 < row.share <= 1:
        raise ValueError(f"row {text!r} has share={row.share}: give a share above 0 and up to 1")
    return row
