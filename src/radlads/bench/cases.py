"""A case is its name: what is measured at which size. Any size may be named; the usual ones are the defaults."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Kind = Literal["train", "prefill", "decode", "kernels"]
KINDS: tuple[Kind, ...] = ("train", "prefill", "decode", "kernels")
DECODE_POSITION = 512

DEFAULT_CASES: dict[Kind, tuple[str, ...]] = {
    "train": ("align_4x512", "align_32x512", "distill_12x512", "extend_1x16384"),
    "prefill": ("prefill_8k", "prefill_8k_by_2k", "prefill_128k_by_2k"),
    "decode": ("decode_b1", "decode_b1_8k", "decode_b1_64k", "decode_b32"),
    "kernels": tuple(
        f"{kernel}_{batch_by_tokens}x{heads}"
        for kernel in ("rwkv7", "gla")
        for heads in ("28x128", "56x64")
        for batch_by_tokens in ("4x512", "12x512", "32x512", "1x16384")
    ),
}
TINY_CASES: dict[Kind, tuple[str, ...]] = {
    "train": ("align_2x64", "distill_2x64", "extend_1x128"),
    "prefill": ("prefill_128", "prefill_128_by_32"),
    "decode": ("decode_b1_64", "decode_b4_64"),
    "kernels": ("rwkv7_2x64x2x32", "gla_2x64x2x32"),
}


@dataclass(frozen=True)
class TrainCase:
    """A complete training step on [batch, tokens]."""

    name: str
    stage: Literal["align", "distill", "extend"]
    batch: int
    tokens: int


@dataclass(frozen=True)
class PrefillCase:
    """Reading a prompt of `tokens` tokens, at once or `piece` tokens at a time."""

    name: str
    tokens: int
    piece: int


@dataclass(frozen=True)
class DecodeCase:
    """Generating for `batch` sequences after a prompt of `position` tokens."""

    name: str
    batch: int
    position: int


@dataclass(frozen=True)
class KernelCase:
    """A recurrence alone on [batch, tokens, heads, head size]."""

    name: str
    kernel: Literal["rwkv7", "gla"]
    shape: tuple[int, int, int, int]


Case = TypeVar("Case", TrainCase, PrefillCase, DecodeCase, KernelCase)


def select_cases(kind: Kind, wanted: str, *, tiny: bool) -> list[str]:
    """The names in a comma-separated list; "all" are the usual ones. Raises ValueError for an empty list."""
    names = (TINY_CASES if tiny else DEFAULT_CASES)[kind] if wanted == "all" else wanted.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"--cases names no case: use all, or some of {', '.join(DEFAULT_CASES[kind])}")
    return names


def train_case(name: str) -> TrainCase:
    """STAGE_BATCHxTOKENS. Raises ValueError for another name."""
    stage, batch, tokens = _parts("train", r"(align|distill|extend)_(\d+)x(\d+k?)", name)
    return TrainCase(name, stage, whole_number(batch), whole_number(tokens))  # type: ignore[arg-type]


def prefill_case(name: str) -> PrefillCase:
    """prefill_TOKENS or prefill_TOKENS_by_PIECE. Raises ValueError for another name."""
    tokens, piece = _parts("prefill", r"prefill_(\d+k?)(?:_by_(\d+k?))?", name)
    return PrefillCase(name, whole_number(tokens), whole_number(piece or tokens))


def decode_case(name: str) -> DecodeCase:
    """decode_bBATCH, after 512 tokens, or decode_bBATCH_POSITION. Raises ValueError for another name."""
    batch, position = _parts("decode", r"decode_b(\d+)(?:_(\d+k?))?", name)
    return DecodeCase(name, whole_number(batch), whole_number(position or str(DECODE_POSITION)))


def kernel_case(name: str) -> KernelCase:
    """KERNEL_BATCHxTOKENSxHEADSxSIZE. Raises ValueError for another name."""
    kernel, *shape = _parts("kernels", r"(rwkv7|gla)_(\d+)x(\d+k?)x(\d+)x(\d+)", name)
    batch, tokens, heads, size = (whole_number(text) for text in shape)
    return KernelCase(name, kernel, (batch, tokens, heads, size))  # type: ignore[arg-type]


def read_cases(read: Callable[[str], Case], names: list[str]) -> list[Case]:
    """All names read, before anything is measured, so that a misspelt one costs no time."""
    return [read(name) for name in names]


def whole_number(text: str) -> int:
    """A number such as 512 or 8k (k: times 1024). Raises ValueError for anything else, and for 0."""
    found = re.fullmatch(r"(\d+)(k?)", text)
    number = int(found[1]) * (1024 if found[2] else 1) if found else 0
    if number < 1:
        raise ValueError(f"a number such as 512 or 8k is needed, not {text!r}")
    return number


def _parts(kind: Kind, pattern: str, name: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, name)
    if found is None:
        raise ValueError(
            f"unknown case {name!r}: the cases of {kind} are {', '.join(DEFAULT_CASES[kind])}, "
            "or such names with other sizes"
        )
    return found.groups()
