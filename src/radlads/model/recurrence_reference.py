"""The recurrences one token at a time in fp32: the oracles for every faster path.

Shape letters: B batch, T tokens, H heads, K key channels, V value channels.
"""

import torch


def rwkv7_reference(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, state_BHVK=None):
    """RAD-RWKV7 time mixing (paper eq. 30-31).

        S_t = S_{t-1} (diag(w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k_t        o_t = S_t r_t

    log_w_BTHK: log decay, in (-exp(-1/2), 0]. kappa_BTHK: removal key, unit norm over K (or 0). a_BTHK: in [0, 1).
    state_BHVK: state before the first token (None: zero). Returns out_BTHV and the state after the last token, fp32.
    """
    r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK = (
        x.float() for x in (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK)
    )
    B, T, H, K = r_BTHK.shape
    state_BHVK = r_BTHK.new_zeros(B, H, v_BTHV.shape[-1], K) if state_BHVK is None else state_BHVK.float()
    outs = []
    for t in range(T):
        erased_BHV = torch.einsum("bhvk,bhk->bhv", state_BHVK, kappa_BTHK[:, t])
        written_BHK = a_BTHK[:, t] * kappa_BTHK[:, t]
        state_BHVK = (
            state_BHVK * log_w_BTHK[:, t].exp()[:, :, None, :]
            - erased_BHV[..., None] * written_BHK[:, :, None, :]
            + v_BTHV[:, t, :, :, None] * k_BTHK[:, t, :, None, :]
        )
        outs.append(torch.einsum("bhvk,bhk->bhv", state_BHVK, r_BTHK[:, t]))
    return torch.stack(outs, dim=1), state_BHVK


def gla_reference(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, state_BHKV=None):
    """RAD-RWKV6 time mixing: gated linear attention without a bonus, the decay applied to the old state.

        S_t = diag(w_t) S_{t-1} + k_t^T v_t        o_t = r_t S_t

    log_w_BTHK: log decay, in [-5, 0]. state_BHKV: state before the first token (None: zero).
    Returns out_BTHV and the state after the last token, both fp32; no K^-1/2 scale is applied.
    """
    r_BTHK, log_w_BTHK, k_BTHK, v_BTHV = (x.float() for x in (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV))
    B, T, H, K = r_BTHK.shape
    state_BHKV = r_BTHK.new_zeros(B, H, K, v_BTHV.shape[-1]) if state_BHKV is None else state_BHKV.float()
    outs = []
    for t in range(T):
        written_BHKV = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        state_BHKV = state_BHKV * log_w_BTHK[:, t].exp()[..., None] + written_BHKV
        outs.append(torch.einsum("bhk,bhkv->bhv", r_BTHK[:, t], state_BHKV))
    return torch.stack(outs, dim=1), state_BHKV
