"""Reading prompts and generating: the student through our own paths, then transformers' Qwen2 as the teacher.

One model is held at a time, so that peak memory is that of the model measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from radlads.bench.cases import DecodeCase, PrefillCase
from radlads.bench.costs import decode_state_bytes, prefill_flops
from radlads.bench.measure import Ceilings, Timing, held_bytes, peak_bytes, release_memory, timed
from radlads.bench.models import random_model, stock_teacher, weight_bytes
from radlads.bench.record import Record, Row
from radlads.convert.shapes import Shape
from radlads.inference.decoder import Decoder
from radlads.inference.prefill import prefill
from radlads.inference.sampling import Sampling
from radlads.model.configuration import RadladsConfig

PREFILL_WARMUP, PREFILL_RUNS = 1, 3
DECODE_WARMUP, DECODE_STEPS = 10, 50
_LOWER = "name a case with a smaller batch or fewer tokens"


class Subject(Protocol):
    """A model whose inference is timed. Prompts are [B, T] on its device."""

    of: str
    config: RadladsConfig

    @property
    def model(self) -> PreTrainedModel:
        """With its weights on the device."""
        ...

    def prefill_timing(self, tokens: torch.Tensor, piece: int) -> Timing:
        """From a prompt to the logits after its last token and the state."""
        ...

    def start_decoding(self, tokens: torch.Tensor) -> Callable[[], None]:
        """Read the prompts; the function that decodes one more token of each, the likeliest."""
        ...


class Student:
    """The recurrent stack as `radlads generate` runs it."""

    of = "student"

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, *, compiled: bool = False):
        self.config, self._device, self._compiled = shape.student, device, compiled
        self.model = random_model(shape.student, device=device, dtype=dtype).requires_grad_(False)
        self.model.compile_blocks(compiled)

    def prefill_timing(self, tokens: torch.Tensor, piece: int) -> Timing:
        """See Subject."""
        if self._compiled:
            torch.compiler.reset()  # else a second shape is compiled for changing shapes
        return timed(
            lambda: prefill(self.model, tokens, piece=piece), self._device, warmup=PREFILL_WARMUP, runs=PREFILL_RUNS
        )

    def start_decoding(self, tokens: torch.Tensor) -> Callable[[], None]:
        """See Subject."""
        decoder = Decoder(self.model, tokens.shape[0], Sampling(temperature=0))
        decoder.prefill(tokens.tolist())
        return decoder.step


class StockTeacher:
    """transformers' Qwen2 with SDPA and its own cache, which reads a prompt at once."""

    of = "teacher"

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        self.config, self._device = shape.teacher, device
        self.model = stock_teacher(shape.teacher, device=device, dtype=dtype)

    @torch.inference_mode()
    def prefill_timing(self, tokens: torch.Tensor, piece: int) -> Timing:
        """See Subject; `piece` has no effect."""
        return timed(lambda: self._read(tokens), self._device, warmup=PREFILL_WARMUP, runs=PREFILL_RUNS)

    @torch.inference_mode()
    def start_decoding(self, tokens: torch.Tensor) -> Callable[[], None]:
        """See Subject."""
        outputs = self._read(tokens)
        cache, token = outputs.past_key_values, outputs.logits.argmax(-1)

        @torch.inference_mode()
        def step() -> None:
            nonlocal token
            token = self.model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)

        return step

    def _read(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One case for one subject: what to time, and the seconds that this machine's ceilings would allow.

    measure: the timing, and the peak memory in bytes while it was taken, with what came before it left out.
    """

    case: str
    work: dict[str, Any]
    tokens: int
    ceiling_s: float
    measure: Callable[[], tuple[Timing, int | None]]


def bench_prefill(
    cases: Sequence[PrefillCase],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    record: Record,
    *,
    teacher: bool,
    compiled: bool,
) -> None:
    """Measure reading prompts, in pieces or at once; the teacher, which reads at once, for every case all the same."""

    def task(case: PrefillCase, subject: Subject) -> Task:
        tokens = torch.randint(subject.config.vocab_size, (1, case.tokens), device=device)
        flops = case.tokens * prefill_flops(subject.config, case.tokens)
        return Task(
            case=case.name,
            work={"batch": 1, "tokens": case.tokens, "piece": case.piece, "compiled": compiled},
            tokens=case.tokens,
            ceiling_s=flops / (ceilings.matmul_tflop_per_s * 1e12),
            measure=lambda: (subject.prefill_timing(tokens, case.piece), peak_bytes(device)),
        )

    for build in _builders(teacher, compiled=compiled):
        _measure_all(build, shape, device, dtype, record, [partial(task, case) for case in cases])


def bench_decode(
    cases: Sequence[DecodeCase],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    record: Record,
    *,
    teacher: bool,
) -> None:
    """Measure generating after prompts; the ceiling is reading every weight once and moving the rows' states."""

    def task(case: DecodeCase, subject: Subject) -> Task:
        tokens = torch.randint(subject.config.vocab_size, (case.batch, case.position), device=device)
        states = case.batch * decode_state_bytes(subject.config, case.position, dtype.itemsize)
        weights = _bytes_read(subject)
        return Task(
            case=case.name,
            work={"batch": case.batch, "position": case.position, "weight_bytes": weights, "state_bytes_moved": states},
            tokens=case.batch,
            ceiling_s=weights / (ceilings.matvec_gb_per_s * 1e9) + states / (ceilings.copy_gb_per_s * 1e9),
            measure=lambda: _decode(subject.start_decoding(tokens), device),
        )

    for build in _builders(teacher):
        _measure_all(build, shape, device, dtype, record, [partial(task, case) for case in cases])


def _builders(teacher: bool, *, compiled: bool = False) -> list[Callable[[Shape, torch.device, torch.dtype], Subject]]:
    builders: list[Callable[[Shape, torch.device, torch.dtype], Subject]] = [partial(Student, compiled=compiled)]
    if teacher:
        builders.append(StockTeacher)
    return builders


def _measure_all(
    build: Callable[[Shape, torch.device, torch.dtype], Subject],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    record: Record,
    tasks: list[Callable[[Subject], Task]],
) -> None:
    """Build a subject, do its tasks, and let go of it. A teacher that does not fit is left out, not a failure."""
    subject: Subject = build(shape, device, dtype)
    record.say(f"{subject.of} built")
    for prepare in tasks:
        release_memory(device)
        task = prepare(subject)
        row = Row(case=task.case, of=subject.of, work=task.work)
        with record.attempt(row, lower=_LOWER, optional=subject.of == "teacher"):
            record.add(_measure(task, subject, device))
    del subject
    release_memory(device)


def _decode(step: Callable[[], None], device: torch.device) -> tuple[Timing, int | None]:
    """Time steps, and the peak memory of steps alone: reading the prompt is another benchmark's."""
    release_memory(device)
    held_bytes(device)
    return timed(step, device, warmup=DECODE_WARMUP, runs=DECODE_STEPS), peak_bytes(device)


def _measure(task: Task, subject: Subject, device: torch.device) -> Row:
    held_bytes(device)
    timing, peak = task.measure()
    return Row(
        case=task.case,
        of=subject.of,
        work=task.work,
        tokens=task.tokens,
        timing=timing,
        share=task.ceiling_s / (timing.median_ms / 1000),
        peak_bytes=peak,
        beside_bytes=None if peak is None else peak - weight_bytes(subject.model),
    )


def _bytes_read(subject: Subject) -> int:
    """Bytes of the weights that every decoded token reads: all but the embedding, unless it is the head as well."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in subject.model.named_parameters()
        if subject.config.tie_word_embeddings or not name.endswith("embed_tokens.weight")
    )
