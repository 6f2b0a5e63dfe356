"""The recurrences alone, forward, and forward with backward, by every backend that is there."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F

from radlads.bench.cases import KernelCase
from radlads.bench.costs import recurrence_bytes
from radlads.bench.measure import Ceilings, held_bytes, peak_bytes, release_memory, timed
from radlads.bench.record import Record, Row
from radlads.model.rad_rwkv7 import MIN_LOG_DECAY
from radlads.model.recurrence import Backend, gla, missing, rwkv7

BACKENDS: tuple[Backend, ...] = ("triton", "fla", "chunked")
WARMUP_RUNS, RUNS = 2, 10
# fla's kernels try up to 40 launch configurations each, which all have to be compiled
TUNING_LIMIT_S = 120


def select_backends(names: str | None) -> list[Backend]:
    """Comma-separated backends, all of them for None. Raises ValueError for a name that is none of them."""
    wanted = BACKENDS if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in BACKENDS]:
        raise ValueError(f"there is no backend {unknown[0]!r}: --backends takes {', '.join(BACKENDS)}")
    return [backend for backend in BACKENDS if backend in wanted]


def bench_kernels(
    cases: list[KernelCase],
    backends: list[Backend],
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    record: Record,
) -> None:
    """Measure each case by each backend; one that cannot run here gets a row that says so."""
    for case in cases:
        tensors = random_inputs(case, device, dtype)
        for backend in backends:
            work = {"kernel": case.kernel, "shape_BTHN": list(case.shape), "backend": backend}
            problem = missing(backend, tensors[2])
            row = Row(case=case.name, of=backend, work=work, problem=problem)
            if problem is not None:
                record.add(row)
                continue
            for backward in (False, True):
                with record.attempt(row, lower="name a case with a smaller batch or fewer tokens"):
                    try:
                        with tuning_limit(TUNING_LIMIT_S) if backend == "fla" else nullcontext():
                            record.add(_measure(case, backend, tensors, device, ceilings, backward=backward))
                    except StillTuning as reason:
                        record.add(replace(row, problem=str(reason)))
                release_memory(device)


class StillTuning(Exception):
    """Triton's autotuner took too long."""


@contextmanager
def tuning_limit(seconds: float) -> Iterator[None]:
    """Have Triton's autotuners raise StillTuning when they want to try another launch after so many seconds."""
    from triton.runtime.autotuner import Autotuner

    try_one, began = Autotuner._bench, time.monotonic()

    def try_one_in_time(self, *args, **keys):  # type: ignore[no-untyped-def]
        if time.monotonic() - began > seconds:
            raise StillTuning(f"still tuning itself after {seconds:.0f} s: what is compiled stays, so run it again")
        return try_one(self, *args, **keys)

    Autotuner._bench = try_one_in_time
    try:
        yield
    finally:
        Autotuner._bench = try_one


def random_inputs(case: KernelCase, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The recurrence's arguments in their ranges, requiring gradients: r, log w (fp32), k, v and for rwkv7 kappa, a."""
    r, k, v, log_w, kappa, a = (torch.randn(case.shape, device=device, dtype=dtype) for _ in range(6))
    decay = MIN_LOG_DECAY * torch.sigmoid(log_w.float())
    tensors = [r, decay, k, v]
    if case.kernel == "rwkv7":
        tensors += [F.normalize(kappa.float(), dim=-1).to(dtype), torch.sigmoid(a)]
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _measure(
    case: KernelCase,
    backend: Backend,
    tensors: list[torch.Tensor],
    device: torch.device,
    ceilings: Ceilings,
    *,
    backward: bool,
) -> Row:
    recurrence: Callable = rwkv7 if case.kernel == "rwkv7" else gla
    d_out = torch.randn_like(tensors[3])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return recurrence(*tensors, backend=backend)[0]

    def both() -> tuple[torch.Tensor, ...]:
        out, _ = recurrence(*tensors, backend=backend)
        return torch.autograd.grad(out, tensors, d_out)

    held = held_bytes(device)
    timing = timed(both if backward else forward, device, warmup=WARMUP_RUNS, runs=RUNS)
    peak = peak_bytes(device)
    ideal = recurrence_bytes(case.kernel, case.shape, backward=backward)
    passes = "forward+backward" if backward else "forward"
    return Row(
        case=case.name,
        of=f"{backend} {'fwd+bwd' if backward else 'fwd'}",
        work={
            **{"kernel": case.kernel, "shape_BTHN": list(case.shape), "backend": backend, "passes": passes},
            "ideal_bytes": ideal,
        },
        tokens=case.shape[0] * case.shape[1],
        timing=timing,
        share=ideal / (timing.median_ms / 1000) / (ceilings.copy_gb_per_s * 1e9),
        peak_bytes=peak,
        beside_bytes=None if peak is None or held is None else peak - held,
    )
