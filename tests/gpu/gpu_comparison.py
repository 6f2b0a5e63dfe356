"""What the GPU tests compare with (the fp32 oracles, and the same behind rounded inputs and outputs), and their ledger.

A kernel that multiplies in bf16 or TF32 cannot be closer to the fp32 oracle than rounding alone brings it. So its bound
is a multiple of the error of the *rounded oracle*: inputs rounded as the kernel's, the recurrence in fp32, outputs and
gradients rounded again (tests/tolerances.py has the multiples).
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pytest
import torch
from tolerances import GPU_BOUNDS

from radlads.model import rad_rwkv6, rad_rwkv7, recurrence

DRY_RUN = os.environ.get("RADLADS_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")

DISPATCH = {"rwkv7": recurrence.rwkv7, "gla": recurrence.gla}
CALLERS = {"rwkv7": rad_rwkv7, "gla": rad_rwkv6}
BACKENDS = {"rwkv7": ("triton", "fla", "chunked"), "gla": ("triton", "fla", "chunked")}
INPUTS = {"rwkv7": ("r", "log_w", "k", "v", "kappa", "a", "state"), "gla": ("r", "log_w", "k", "v", "state")}
NEVER_ROUNDED = ("log_w", "state")  # fp32 in every backend


def require(backend: str) -> None:
    """Skip the test where the backend cannot run."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not importable")
    if backend == "triton" and DRY_RUN and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a dry run of Triton kernels needs TRITON_INTERPRET=1")
    if backend == "fla" and DRY_RUN:
        pytest.skip("fla does not run on a CPU")
    if backend == "fla" and not recurrence.fla_is_importable():
        pytest.skip("fla is not importable")


def precision_of(backend: str, dtype: torch.dtype) -> str:
    """What a backend's products round to. fp32: fla's in TF32, our kernels' and (see conftest) torch's in fp32."""
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if backend == "fla" else "exact"


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """x with bf16's 8 or TF32's 11 significant bits ("exact": all of them), in its own dtype."""
    if precision == "bf16":
        return x.bfloat16().to(x.dtype)
    if precision == "tf32" and x.dtype == torch.float32:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x


class Rounding(torch.autograd.Function):
    """Rounds a tensor forward and its gradient backward."""

    @staticmethod
    def forward(ctx, x, precision):
        ctx.precision = precision
        return rounded(x, precision)

    @staticmethod
    def backward(ctx, gradient):
        return rounded(gradient, ctx.precision), None


def oracle(kind: str, precision: str) -> Callable:
    """The oracle with rounded inputs and outputs, to be called as the recurrence is."""

    def run(*inputs):
        pairs = zip(INPUTS[kind], inputs, strict=True)
        out, state = DISPATCH[kind](
            *(x if name in NEVER_ROUNDED else Rounding.apply(x, precision) for name, x in pairs), backend="reference"
        )
        return Rounding.apply(out, precision), state

    return run


def kernels(kind: str, backend: str) -> Callable:
    """The recurrence on a backend, to be called as the recurrence is."""
    return lambda *inputs: DISPATCH[kind](*inputs, backend=backend)


@contextmanager
def mixers_call(recurrences: dict[str, Callable]) -> Iterator[None]:
    """Let mixers run these recurrences, by kind. Fails if none of them was called."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for kind, function in recurrences.items():
            counted = lambda *inputs, function=function: calls.append(1) or function(*inputs)  # noqa: E731
            patch.setattr(CALLERS[kind], kind, counted)
        yield
    assert calls, "no mixer called the recurrence that was put in its place"


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the oracle, and how far rounding alone is: relative errors."""

    bound: str
    compared: str
    where: str
    precision: str
    error: float
    rounding: float

    @property
    def allowed(self) -> float:
        return GPU_BOUNDS[self.bound].allowed(self.rounding, self.precision)

    @property
    def used(self) -> float:
        """The error over the bound: at most 1, infinite for a result that is not finite."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


class Ledger:
    """Every comparison of a run, the tightest of each kind."""

    def __init__(self) -> None:
        self._tightest: dict[tuple[str, str], Comparison] = {}

    def note(self, comparison: Comparison) -> None:
        key = (comparison.bound, comparison.compared)
        if key not in self._tightest or self._tightest[key].used < comparison.used:
            self._tightest[key] = comparison

    def rows(self) -> list[dict[str, object]]:
        """One row for each kind of comparison, by bound and name."""
        tightest = [self._tightest[key] for key in sorted(self._tightest)]
        return [asdict(x) | {"allowed": x.allowed, "used": x.used} for x in tightest]

    def table(self) -> list[str]:
        """The rows as text."""
        lines = [f"{'bound':<16} {'compared':<36} {'error':>8} {'rounding':>8} {'allowed':>8} {'used':>5}  where"]
        return lines + [
            f"{row['bound']:<16} {row['compared']:<36} {row['error']:8.1e} {row['rounding']:8.1e} "
            f"{row['allowed']:8.1e} {row['used']:5.0%}  {row['where']}"
            for row in self.rows()
        ]


LEDGER = Ledger()


def assert_within_bounds(comparisons: list[Comparison]) -> None:
    """Note every comparison in the ledger; fail if one exceeds its bound."""
    assert comparisons
    for comparison in comparisons:
        LEDGER.note(comparison)
    failed = [
        f"{x.compared}: {x.where}: {x.error:.1e}, rounding alone {x.rounding:.1e}, allowed {x.allowed:.1e}"
        for x in comparisons
        if not x.used < 1
    ]
    assert not failed, "\n".join(["beyond the bound:", *failed])
