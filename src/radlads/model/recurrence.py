"""The recurrences as the mixers call them: picks the step (T = 1), fla (CUDA) or chunked torch path. Only door to fla.

Equations stand in recurrence_reference.py. Shape letters: B batch, T tokens, H heads, K key channels, V value
channels, G chunks, L tokens per chunk.
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F

from .recurrence_reference import gla_reference, rwkv7_reference

Backend = Literal["auto", "reference", "chunked", "fla"]

# Within a chunk of L tokens factors reach exp(-sum(log_w)): L * 0.6065 = 38.8 for RWKV7 and, around the chunk's
# middle, 8 * 5 = 40 for RWKV6. fp32 overflows at 88, and the products of two such factors must not either.
RWKV7_CHUNK = 64
GLA_CHUNK = 16


def rwkv7(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK=None, backend: Backend = "auto"):
    """RAD-RWKV7 time mixing of [B, T, H, N] tensors; out [B, T, H, V] in v's dtype and the fp32 state [B, H, V, K].

    Ranges as in rwkv7_reference. Raises ValueError if the backend cannot run here.
    """
    choice = choose_backend(backend, v_BTHV)
    if choice == "fla":
        return _rwkv7_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK)
    run = rwkv7_reference if choice == "reference" else rwkv7_chunked
    with torch.autocast(v_BTHV.device.type, enabled=False):
        out_BTHV, state_BHVK = run(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK)
    return out_BTHV.to(v_BTHV.dtype), state_BHVK


def gla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV=None, backend: Backend = "auto"):
    """RAD-RWKV6 time mixing of [B, T, H, N] tensors; out [B, T, H, V] in v's dtype and the fp32 state [B, H, K, V].

    Ranges as in gla_reference. Raises ValueError if the backend cannot run here.
    """
    choice = choose_backend(backend, v_BTHV)
    if choice == "fla":
        return _gla_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV)
    run = gla_reference if choice == "reference" else gla_chunked
    with torch.autocast(v_BTHV.device.type, enabled=False):
        out_BTHV, state_BHKV = run(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV)
    return out_BTHV.to(v_BTHV.dtype), state_BHKV


def choose_backend(backend: Backend, v_BTHV: torch.Tensor) -> Backend:
    """Resolve "auto": the oracle's single step for T = 1, fla on CUDA where it imports, else chunked torch."""
    on_gpu = v_BTHV.device.type == "cuda"
    if backend == "fla" and not (on_gpu and fla_is_importable()):
        raise ValueError("the fla backend needs a CUDA GPU and fla-core: pip install 'radlads[gpu]', or choose 'auto'")
    if backend != "auto":
        return backend
    if v_BTHV.shape[1] == 1:
        return "reference"
    return "fla" if on_gpu and fla_is_importable() else "chunked"


@functools.cache
def fla_is_importable() -> bool:
    """True where flash-linear-attention's operators import (they need triton even for that)."""
    try:
        import fla.ops.gla
        import fla.ops.rwkv7  # noqa: F401
    except ImportError:
        return False
    return True


def _rwkv7_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK):
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        raise ValueError("fla-core is not installed: pip install 'radlads[gpu]'") from error

    dtype = v_BTHV.dtype
    out_BTHV, state_BHKV = chunk_rwkv7(
        r=r_BTHK.to(dtype),
        w=log_w_BTHK,
        k=k_BTHK.to(dtype),
        v=v_BTHV,
        a=-kappa_BTHK.to(dtype),
        b=(kappa_BTHK * a_BTHK).to(dtype),
        scale=1.0,
        initial_state=None if state_BHVK is None else state_BHVK.transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return out_BTHV, state_BHKV.transpose(-1, -2)


def _gla_fla(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV):
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        raise ValueError("fla-core is not installed: pip install 'radlads[gpu]'") from error

    dtype = v_BTHV.dtype
    return chunk_gla(
        q=r_BTHK.to(dtype),
        k=k_BTHK.to(dtype),
        v=v_BTHV,
        g=log_w_BTHK,
        scale=1.0,
        initial_state=state_BHKV,
        output_final_state=True,
    )


def rwkv7_chunked(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK=None):
    """rwkv7_reference by chunks: the removals inside a chunk are one unit-triangular solve. Differentiable.

    With u_t = S_{t-1} kappa_t (what token t removes) and P the running product of w inside the chunk,
    (I + tril_-1(kappa P/w . (a kappa)/P)) U = (kappa P/w) S_0 + tril_-1(kappa P/w . k/P) V.
    """
    T = r_BTHK.shape[1]
    r, log_w, k, v, kappa, a = _chunks((r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK), RWKV7_CHUNK)
    L, K = r.shape[-2:]
    log_P = log_w.cumsum(-2)
    log_P_end = log_P[..., -1:, :]
    P, P_inverse, to_end = log_P.exp(), (-log_P).exp(), (log_P_end - log_P).exp()
    written = kappa * a
    kappa_P = kappa * (log_P - log_w).exp()
    r_P = r * P
    queries = torch.cat([kappa_P, r_P], dim=-2)
    keys = torch.cat([written * P_inverse, k * P_inverse], dim=-2)
    scores = queries @ keys.transpose(-1, -2)
    removal_removal, removal_write = scores[..., :L, :L].tril(-1), scores[..., :L, L:].tril(-1)
    read_removal, read_write = scores[..., L:, :L].tril(), scores[..., L:, L:].tril()
    removed = torch.linalg.solve_triangular(
        removal_removal, torch.cat([kappa_P, removal_write @ v], dim=-1), upper=False, unitriangular=True
    )
    removed_by_state, removed_by_writes = removed[..., :K], removed[..., K:]
    k_end, written_end = k * to_end, written * to_end

    # The chunk as an affine map of the state: S -> S transfer + gain
    transfer = torch.diag_embed(log_P_end.squeeze(-2).exp()) - removed_by_state.transpose(-1, -2) @ written_end
    gain = v.transpose(-1, -2) @ k_end - removed_by_writes.transpose(-1, -2) @ written_end
    starts, state = _scan_affine(state_BHVK, transfer, gain)

    from_state = r_P - read_removal @ removed_by_state
    inside = read_write @ v - read_removal @ removed_by_writes
    out = inside + from_state @ starts.transpose(-1, -2)
    return _unchunk(out, T), state


def gla_chunked(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV=None):
    """gla_reference by chunks, factored around each chunk's middle so that no factor overflows. Differentiable."""
    T = r_BTHK.shape[1]
    r, log_w, k, v = _chunks((r_BTHK, log_w_BTHK, k_BTHK, v_BTHV), GLA_CHUNK)
    log_P = log_w.cumsum(-2)
    log_P_end = log_P[..., -1:, :]
    middle = log_P[..., log_P.shape[-2] // 2, :].unsqueeze(-2)
    scores = (r * (log_P - middle).exp()) @ (k * (middle - log_P).exp()).transpose(-1, -2)
    gain = (k * (log_P_end - log_P).exp()).transpose(-1, -2) @ v
    starts, state = _scan_decay(state_BHKV, log_P_end.squeeze(-2).exp().unsqueeze(-1), gain)
    out = scores.tril() @ v + (r * log_P.exp()) @ starts
    return _unchunk(out, T), state


def _chunks(tensors, chunk: int):
    """[B, T, H, N] tensors as fp32 [B, H, G, L, N]; T is padded with zeros, which leave the state as it is."""
    B, T, H, _ = tensors[0].shape
    L = min(chunk, T)
    padding = -T % L
    padded = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in tensors)
    return [x.float().view(B, (T + padding) // L, L, H, -1).permute(0, 3, 1, 2, 4).contiguous() for x in padded]


def _unchunk(out_BHGLV: torch.Tensor, num_tokens: int) -> torch.Tensor:
    B, H, G, L, V = out_BHGLV.shape
    return out_BHGLV.permute(0, 2, 3, 1, 4).reshape(B, G * L, H, V)[:, :num_tokens]


def _scan_affine(state, transfer, gain):
    """States before each chunk [B, H, G, V, K] and after the last, where a chunk maps S to S transfer + gain."""
    state = torch.zeros_like(gain[:, :, 0]) if state is None else state.float()
    starts = []
    for chunk in range(gain.shape[2]):
        starts.append(state)
        state = state @ transfer[:, :, chunk] + gain[:, :, chunk]
    return torch.stack(starts, dim=2), state


def _scan_decay(state, decay, gain):
    """As _scan_affine, where a chunk maps S to decay * S + gain."""
    state = torch.zeros_like(gain[:, :, 0]) if state is None else state.float()
    starts = []
    for chunk in range(gain.shape[2]):
        starts.append(state)
        state = state * decay[:, :, chunk] + gain[:, :, chunk]
    return torch.stack(starts, dim=2), state
