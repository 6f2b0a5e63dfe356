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


def window_reference(q_BTHN, k_BTKN, v_BTKN, window_tokens, sink_tokens):
    """Softmax attention of each token to the last window_tokens, itself included, and the text's first sink_tokens.

        o_t = sum_s softmax_s(q_t . k_s N^-1/2) v_s        s <= t and (s > t - W or s < S)

    K key/value heads, each for H / K query heads in a row. Returns out_BTHN, fp32.
    """
    q_BTHN, k_BTKN, v_BTKN = (x.float() for x in (q_BTHN, k_BTKN, v_BTKN))
    k_BTHN, v_BTHN = (x.repeat_interleave(q_BTHN.shape[2] // x.shape[2], dim=2) for x in (k_BTKN, v_BTKN))
    steps = torch.arange(q_BTHN.shape[1], device=q_BTHN.device)
    t, s = steps[:, None], steps[None, :]
    seen = (s <= t) & ((s > t - window_tokens) | (s < sink_tokens))
    scores_BHTS = torch.einsum("bthn,bshn->bhts", q_BTHN, k_BTHN) * q_BTHN.shape[-1] ** -0.5
    return torch.einsum("bhts,bshn->bthn", scores_BHTS.masked_fill(~seen, -torch.inf).softmax(-1), v_BTHN)
