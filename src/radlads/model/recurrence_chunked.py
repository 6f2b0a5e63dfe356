"""The recurrences by chunks in torch alone: the path for CPUs, differentiable, and stable at the decays' limits.

Equations stand in recurrence_reference.py. Shape letters: B batch, T tokens, H heads, N head size, K key channels, V
value channels, G chunks, L tokens per chunk.
"""

import torch
import torch.nn.functional as F

from .exporting import is_exporting

# Around a chunk's middle, factors reach exp(L / 2 * max(-log_w)): 16 * 0.6065 = 10 for RWKV7, 16 * 5 = 80 for RWKV6.
# fp32 overflows at exp(88). Where the product of two factors overflows, it belongs to the future and is masked.
RWKV7_CHUNK = 32
GLA_CHUNK = 32


def rwkv7_chunked(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK=None):
    """rwkv7_reference by chunks, for any T; differentiable once."""
    return _by_chunks(RWKV7_CHUNK, state_BHVK, r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK)


def gla_chunked(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV=None):
    """gla_reference by chunks, for any T; differentiable once."""
    state_BHVK = None if state_BHKV is None else state_BHKV.mT
    out_BTHV, state_BHVK = _by_chunks(GLA_CHUNK, state_BHVK, r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, None, None)
    return out_BTHV, state_BHVK.mT


def _by_chunks(*args):
    # An exported graph has the operations themselves, and derives its own gradients
    if is_exporting():
        return _forward_by_chunks(*args)[:2]
    return _run_chunked(*args)


@torch.compiler.disable
def _run_chunked(*args):
    return Chunked.apply(*args)


class Chunked(torch.autograd.Function):
    """Both recurrences by chunks of L tokens: RAD-RWKV7's, and without removal keys RAD-RWKV6's.

    Let c_t be the running sum of log w inside a chunk, m its value in the middle, e its value at the end. With the rows

        X = [r exp(c - m); kappa exp(c - log_w - m)]    what reads the state: outputs, then removals
        Y = [k exp(m - c); kappa a exp(m - c)]          what is written to it: new values, then removals
        H = [v; -U]                                     the values written, U being what the removals found
        M = X Y^T                                       masked: outputs see their own token, removals only earlier ones

    a chunk that starts with the state S gives, S~ standing for S exp(m),

        out = output rows of X S~^T + M H               U = removal rows of X S~^T + M H
        S' = S exp(e) + (H^T Y) exp(e - m)

    U is on both sides; solving for it inverts one unit-triangular matrix. The backward pass is these equations by hand,
    dX, dY, ... being gradients and G = [d out; dQ], dQ those of U's equation. It does not depend on m, which cancels.
    Tensors are [B, H, G, L, N] or, with both kinds of rows, [B, H, G, 2L, N]; states are [B, H, G, V, K].
    """

    @staticmethod
    def forward(ctx, chunk, state, r, log_w, k, v, kappa, a):
        ctx.dtypes = [None if x is None else x.dtype for x in (state, r, log_w, k, v, kappa, a)]
        ctx.num_tokens = v.shape[1]
        ctx.L = min(chunk, v.shape[1])
        out, state, saved = _forward_by_chunks(chunk, state, r, log_w, k, v, kappa, a)
        ctx.save_for_backward(*saved)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_state):
        with torch.autocast(d_out.device.type, enabled=False):
            return Chunked._backward(ctx, d_out, d_state)

    @staticmethod
    def _backward(ctx, d_out, d_state):
        saved = ctx.saved_tensors
        X, Y, M, H, states, starts, inverse, grow, shrink, shrink_before, kappa, a, at_middle, to_end, over_all = saved
        L = ctx.L
        G = torch.empty_like(H)
        G[..., :L, :] = _chunks(d_out, L)
        dZ, d_end, d_state = _scan_backward(G, d_state, X, Y, M, states, inverse, at_middle, to_end, over_all)
        dM = (G @ H.mT).masked_fill_(_future(L, X.device, kappa is not None), 0.0)
        dX = (dM @ Y).add_(G @ starts)
        dY = (dM.mT @ X).add_(H @ dZ)
        dv = (M[..., :L].mT @ G).add_(Y[..., :L, :] @ dZ.mT)
        d_log = (dX * X).sub_(dY * Y)
        dc = d_log[..., :L, :]
        d_kappa = d_a = None
        if kappa is not None:
            d_removal = dX[..., L:, :]
            d_written = dY[..., L:, :] * grow
            d_kappa, d_a = (d_removal * shrink_before).add_(d_written * a), d_written.mul_(kappa)
            dc = dc + d_log[..., L:, :]
        dc[..., -1, :] += d_end
        d_log_w = dc.flip(-2).cumsum(-2).flip(-2)
        if kappa is not None:
            d_log_w -= d_removal * X[..., L:, :]
        gradients = (dX[..., :L, :] * shrink, d_log_w, dY[..., :L, :] * grow, dv, d_kappa, d_a)
        d_state = None if ctx.dtypes[0] is None else d_state.to(ctx.dtypes[0])
        pairs = zip(gradients, ctx.dtypes[1:], strict=True)
        return None, d_state, *(None if g is None else _tokens(g, ctx.num_tokens, dtype) for g, dtype in pairs)


def _forward_by_chunks(chunk, state, r, log_w, k, v, kappa, a):
    """Chunked's outputs and last state, and what its backward pass needs."""
    num_tokens, dtype = v.shape[1], v.dtype
    r, log_w, k, v, kappa, a = (_chunks(x, chunk) for x in (r, log_w, k, v, kappa, a))
    L = r.shape[-2]
    c = log_w.cumsum(-2)
    middle, end = c[..., L // 2 : L // 2 + 1, :], c[..., -1:, :]
    at_middle, to_end, over_all = middle.exp(), (end - middle).exp(), end.exp()
    c = c - middle
    grow, shrink = (-c).exp(), c.exp()
    shrink_before = inverse = None
    if kappa is None:
        X, Y = r * shrink, k * grow
    else:
        shrink_before = (c - log_w).exp_()
        X, Y = _products((r, shrink), (kappa, shrink_before)), _products((k, grow), (kappa * a, grow))
    M = (X @ Y.mT).masked_fill_(_future(L, r.device, kappa is not None), 0.0)
    if kappa is not None:
        identity = torch.eye(L, device=r.device)
        inverse = torch.linalg.solve_triangular(M[..., L:, L:], identity, upper=False, unitriangular=True)
    states, H = _scan(v, state, X, Y, M, inverse, at_middle, to_end, over_all)
    starts = states[:, :, :-1] * at_middle
    out = (M[..., :L, :] @ H).add_(X[..., :L, :] @ starts.mT)
    saved = X, Y, M, H, states, starts, inverse, grow, shrink, shrink_before, kappa, a, at_middle, to_end, over_all
    return _tokens(out, num_tokens, dtype), states[:, :, -1].clone(), saved


def _products(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Each pair's product [B, H, G, L, N], one below the other."""
    if is_exporting():
        return torch.cat([x * y for x, y in pairs], dim=-2)
    *batch, L, N = pairs[0][0].shape
    rows = pairs[0][0].new_empty(*batch, len(pairs) * L, N)
    for (x, y), out in zip(pairs, rows.split(L, dim=-2), strict=True):
        torch.mul(x, y, out=out)
    return rows


def _scan(v, state, X, Y, M, inverse, at_middle, to_end, over_all):
    """The states [B, H, G + 1, V, K] before each chunk and after the last, and H."""
    L, V, K = v.shape[-2], v.shape[-1], X.shape[-1]
    H = v
    if inverse is not None and not is_exporting():
        H = v.new_empty(*v.shape[:3], 2 * L, V)
        H[..., :L, :] = v
    v = H[..., :L, :]
    state = X.new_zeros(*X.shape[:2], V, K) if state is None else state.float()
    per_chunk = [x.unbind(2) for x in (v.mT @ Y[..., :L, :], at_middle, to_end, over_all)]
    if inverse is not None:
        found_in_state, found_in_chunk = inverse @ X[..., L:, :], inverse @ (M[..., L:, :L] @ v)
        per_chunk += [x.unbind(2) for x in (found_in_state, found_in_chunk, Y[..., L:, :], H[..., L:, :])]
    states, removed = [state], []
    for gain, middle, end, all_of_it, *removing in zip(*per_chunk, strict=True):
        if removing:
            in_state, in_chunk, removal_keys, out = removing
            found = in_chunk + in_state @ (state * middle).mT
            removed.append(-found if is_exporting() else torch.neg(found, out=out))
            gain = gain + removed[-1].mT @ removal_keys
        state = (state * all_of_it).addcmul_(gain, end)
        states.append(state)
    if removed and is_exporting():
        H = torch.cat([H, torch.stack(removed, dim=2)], dim=-2)
    return torch.stack(states, dim=2), H


def _scan_backward(G, d_state, X, Y, M, states, inverse, at_middle, to_end, over_all):
    """Fill G's removal rows; return the gradients of H^T Y (dZ) and of e for every chunk, and of the first state."""
    L = M.shape[-1] if inverse is None else inverse.shape[-1]
    per_chunk = [x.unbind(2) for x in (at_middle, to_end, over_all, states[:, :, 1:], X, G)]
    if inverse is not None:
        through_chunk = inverse.mT @ (M[..., :L, L:].mT @ G[..., :L, :])
        through_state = inverse.mT @ Y[..., L:, :]
        per_chunk += [x.unbind(2) for x in (through_chunk, through_state, G[..., L:, :])]
    gains, ends = [], []
    for middle, end, all_of_it, after, reads, rows, *removing in reversed(list(zip(*per_chunk, strict=True))):
        d_gain = d_state * end
        if removing:
            in_chunk, in_state, removal_rows = removing
            torch.neg(in_chunk + in_state @ d_gain.mT, out=removal_rows)
        ends.append((d_state * after).sum(-2))
        gains.append(d_gain)
        d_state = (d_state * all_of_it).addcmul_(rows.mT @ reads, middle)
    return torch.stack(gains[::-1], dim=2), torch.stack(ends[::-1], dim=2), d_state


def _future(L: int, device: torch.device, removes: bool) -> torch.Tensor:
    """Mask of M, True where a row must not see a column: outputs the tokens after theirs, removals theirs too."""
    ones = torch.ones(L, L, dtype=torch.bool, device=device)
    if not removes:
        return ones.triu(1)
    return torch.cat([ones.triu(1).repeat(1, 2), ones.triu(0).repeat(1, 2)])


def _chunks(x, chunk: int):
    """[B, T, H, N] as fp32 [B, H, G, L, N] (None stays None), T padded with zeros, which leave the state as it is."""
    if x is None:
        return None
    B, T, H, N = x.shape
    L = min(chunk, T)
    if padding := -T % L:
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
    return x.float().view(B, (T + padding) // L, L, H, N).permute(0, 3, 1, 2, 4).contiguous()


def _tokens(x_BHGLN: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of _chunks: [B, T, H, N] in `dtype`."""
    B, H, G, L, N = x_BHGLN.shape
    return x_BHGLN.permute(0, 2, 3, 1, 4).to(dtype).reshape(B, G * L, H, N)[:, :num_tokens]
