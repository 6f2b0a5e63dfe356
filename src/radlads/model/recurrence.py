"""The recurrences as the mixers call them: picks the step (T = 1), the GPU's kernels or the chunked torch path.

On CUDA both run on our own Triton kernels (rwkv7_triton.py, gla_triton.py); on fla's where it is asked for, or for a
head size that ours do not have. The only door to fla.

Equations stand in recurrence_reference.py. Shape letters: B batch, T tokens, H heads, K key channels, V value
channels.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Literal, get_args

import torch

from .chunked_kernels import HEAD_SIZES as TRITON_HEAD_SIZES
from .chunked_kernels import triton
from .gla_triton import gla as gla_triton
from .packed_rows import Texts, run_text_by_text
from .recurrence_chunked import gla_chunked, rwkv7_chunked
from .recurrence_reference import gla_reference, rwkv7_reference
from .rwkv7_triton import rwkv7 as rwkv7_triton

Backend = Literal["auto", "reference", "chunked", "triton", "fla"]
AUTOMATIC: tuple[Backend, ...] = ("triton", "fla", "chunked")
OLDEST_CAPABILITY = (8, 0)  # the first with bf16 matrix units


def rwkv7(
    r_BTHK,
    log_w_BTHK,
    k_BTHK,
    v_BTHV,
    kappa_BTHK,
    a_BTHK,
    state_BHVK=None,
    backend: Backend = "auto",
    texts: Texts | None = None,
):
    """RAD-RWKV7 time mixing of [B, T, H, N] tensors; out [B, T, H, V] in v's dtype and the fp32 state [B, H, V, K].

    Ranges as in rwkv7_reference. texts: where rows hold several, each of which begins with a state of zeros; the states
    that come back are those of each row's last. Raises ValueError if the backend cannot run here.
    """
    choice = choose_backend(backend, v_BTHV)
    if texts is not None and choice != "triton":
        assert state_BHVK is None, "packed rows start without a state"
        text_alone = functools.partial(rwkv7, backend=backend)
        return run_text_by_text(text_alone, texts, r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK)
    if choice == "triton":
        wanted, dtype = v_BTHV.dtype, triton_dtype(v_BTHV)
        r_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK = (x.to(dtype) for x in (r_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK))
        log_w_BTHK, numbers = log_w_BTHK.float(), None if texts is None else texts.numbers
        out_BTHV, state_BHVK = rwkv7_triton(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK, numbers)
        return out_BTHV.to(wanted) if wanted == torch.float16 else out_BTHV, state_BHVK
    if choice == "fla":
        return _rwkv7_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK)
    run = rwkv7_reference if choice == "reference" else rwkv7_chunked
    with torch.autocast(v_BTHV.device.type, enabled=False):
        out_BTHV, state_BHVK = run(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK)
    return out_BTHV.to(v_BTHV.dtype), state_BHVK


def gla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV=None, backend: Backend = "auto", texts: Texts | None = None):
    """RAD-RWKV6 time mixing of [B, T, H, N] tensors; out [B, T, H, V] in v's dtype and the fp32 state [B, H, K, V].

    Ranges as in gla_reference, texts as in rwkv7. Raises ValueError if the backend cannot run here.
    """
    choice = choose_backend(backend, v_BTHV)
    if texts is not None and choice != "triton":
        assert state_BHKV is None, "packed rows start without a state"
        return run_text_by_text(functools.partial(gla, backend=backend), texts, r_BTHK, log_w_BTHK, k_BTHK, v_BTHV)
    if choice == "triton":
        wanted, dtype = v_BTHV.dtype, triton_dtype(v_BTHV)
        r_BTHK, k_BTHK, v_BTHV = (x.to(dtype) for x in (r_BTHK, k_BTHK, v_BTHV))
        log_w_BTHK, numbers = log_w_BTHK.float(), None if texts is None else texts.numbers
        out_BTHV, state_BHKV = gla_triton(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV, numbers)
        return out_BTHV.to(wanted) if wanted == torch.float16 else out_BTHV, state_BHKV
    if choice == "fla":
        return _gla_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV)
    run = gla_reference if choice == "reference" else gla_chunked
    with torch.autocast(v_BTHV.device.type, enabled=False):
        out_BTHV, state_BHKV = run(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV)
    return out_BTHV.to(v_BTHV.dtype), state_BHKV


def choose_backend(backend: Backend, v_BTHV: torch.Tensor) -> Backend:
    """Resolve "auto": the oracle's single step for T = 1, else the first of triton, fla and chunked that runs here.

    Raises ValueError, saying what is missing, if the backend asked for cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"there is no backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        if v_BTHV.shape[1] == 1:
            return "reference"
        return next(choice for choice in AUTOMATIC if missing(choice, v_BTHV) is None)
    if problem := missing(backend, v_BTHV):
        raise ValueError(problem)
    return backend


def runs_on_triton(backend: Backend, v: torch.Tensor) -> bool:
    """Whether such values, of any number of tokens, run on our kernels. Raises ValueError as choose_backend does."""
    if backend == "auto":
        return missing("triton", v) is None
    return backend == "triton" and choose_backend(backend, v) == "triton"


def missing(backend: Backend, v_BTHV: torch.Tensor) -> str | None:
    """Why a backend cannot run on such values, in a sentence with the remedy; None if it can."""
    if backend not in ("triton", "fla"):
        return None
    if v_BTHV.device.type != "cuda":
        return f"the {backend} backend needs a CUDA GPU, but the tensors are on {v_BTHV.device.type}: choose 'auto'"
    if capability(v_BTHV.device.index) < OLDEST_CAPABILITY:
        return f"the {backend} backend needs a GPU of compute capability 8.0 (Ampere) or newer: choose 'chunked'"
    if backend == "fla":
        return (
            None if fla_is_importable() else "fla-core is not installed: pip install 'radlads[gpu]', or choose 'auto'"
        )
    if triton is None:
        return "triton is not installed: pip install 'radlads[gpu]', or choose 'auto'"
    if v_BTHV.shape[-1] not in TRITON_HEAD_SIZES:
        sizes = " and ".join(map(str, TRITON_HEAD_SIZES))
        return f"the triton backend has kernels for head sizes {sizes}, not {v_BTHV.shape[-1]}: choose 'auto'"
    return None


def capability(device_index: int | None) -> tuple[int, int]:
    """The compute capability of a CUDA device. Not cached: torch.compile warns of functools.cache."""
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def fla_is_importable() -> bool:
    """True where flash-linear-attention's operators import (they need triton even for that)."""
    try:
        import fla.ops.gla
        import fla.ops.rwkv7  # noqa: F401
    except ImportError:
        return False
    return True


def kernel_dtype(v_BTHV: torch.Tensor) -> torch.dtype:
    """What the GPU's kernels multiply in: autocast's dtype where that is on, else v's. Decay and state stay fp32."""
    kind = v_BTHV.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else v_BTHV.dtype


def triton_dtype(v_BTHV: torch.Tensor) -> torch.dtype:
    """kernel_dtype, but fp32 for fp16, which does not hold what decays undone over a chunk grow to."""
    dtype = kernel_dtype(v_BTHV)
    return dtype if dtype == torch.bfloat16 else torch.float32


def _fla_operator(module: str, name: str) -> Callable:
    """By name: transformers refuses a hub model if a package is missing that its code imports outside of a try."""
    operator: Callable = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    return operator


@torch.compiler.disable
def _rwkv7_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK):
    chunk_rwkv7 = _fla_operator("rwkv7", "chunk_rwkv7")
    dtype = kernel_dtype(v_BTHV)
    out_BTHV, state_BHKV = chunk_rwkv7(
        r=r_BTHK.to(dtype),
        w=log_w_BTHK,
        k=k_BTHK.to(dtype),
        v=v_BTHV.to(dtype),
        a=-kappa_BTHK.to(dtype),
        b=(kappa_BTHK * a_BTHK).to(dtype),
        scale=1.0,
        initial_state=None if state_BHVK is None else state_BHVK.transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return out_BTHV, state_BHKV.transpose(-1, -2)


@torch.compiler.disable
def _gla_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV):
    chunk_gla = _fla_operator("gla", "chunk_gla")
    dtype = kernel_dtype(v_BTHV)
    return chunk_gla(
        q=r_BTHK.to(dtype),
        k=k_BTHK.to(dtype),
        v=v_BTHV.to(dtype),
        g=log_w_BTHK,
        scale=1.0,
        initial_state=state_BHKV,
        output_final_state=True,
    )
