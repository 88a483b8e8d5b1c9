"""DeltaProduct in float64 NumPy, written from the equation; imports nothing of the package.

    S <- exp(g_t) S;   S <- S + beta_tr k_tr (v_tr - S^T k_tr)^T for r = 1..R;   o_t = scale S^T q_t

The loops over tokens and factors are explicit, batch and heads are array axes. The reverse pass
differentiates these lines one by one; test_oracle.py holds it against finite differences.
"""

import numpy as np


def delta_product(
    q,
    k,
    v,
    beta,
    g=None,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
    use_qk_l2norm=False,
    cotangents=None,
):
    """Outputs and, given cotangents ``(do, dfinal_state)``, gradients by argument name.

    Returns ``(o, final_state)`` or ``(o, final_state, gradients)``, all float64.
    """
    raw_q, raw_k = _wide(q), _wide(k)
    q, k = (_l2norm(raw_q), _l2norm(raw_k)) if use_qk_l2norm else (raw_q, raw_k)
    v, beta = _wide(v), _wide(beta)
    B, T, R, H, K = k.shape
    Hv, V = v.shape[-2:]
    q, k = np.repeat(q, Hv // H, axis=2), np.repeat(k, Hv // H, axis=3)
    decay = np.ones((B, T, Hv)) if g is None else np.exp(_wide(g))
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, Hv, K, V)) if initial_state is None else _wide(initial_state)
    starts = np.zeros((B, T), bool)
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]

    o = np.zeros((B, T, Hv, V))
    tape = []
    for t in range(T):
        S = np.where(starts[:, t, None, None, None], 0.0, S)
        tape.append(S)
        S = decay[:, t, :, None, None] * S
        for r in range(R):
            tape.append(S)
            error = v[:, t, r] - _read(S, k[:, t, r])
            S = S + beta[:, t, r, :, None, None] * _outer(k[:, t, r], error)
        tape.append(S)
        o[:, t] = scale * _read(S, q[:, t])
    if cotangents is None:
        return o, S

    cotangents = [_wide(c) for c in cotangents]
    gradients = _backward((q, k, v, beta, decay), starts, scale, tape, cotangents)
    gradients["q"] = gradients["q"].reshape(B, T, H, Hv // H, K).sum(3)
    gradients["k"] = gradients["k"].reshape(B, T, R, H, Hv // H, K).sum(4)
    if use_qk_l2norm:
        for name, raw in (("q", raw_q), ("k", raw_k)):
            gradients[name] = _l2norm_backward(raw, gradients[name])
    if g is None:
        del gradients["g"]
    return o, S, gradients


def _backward(inputs, starts, scale, tape, cotangents):
    """Gradients by argument name, of q and k for every value head, from all states on the way."""
    q, k, v, beta, decay = inputs
    do, dS = cotangents
    T, R = k.shape[1:3]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbeta, dg = np.zeros_like(beta), np.zeros_like(decay)
    for t in reversed(range(T)):
        S_after = tape.pop()
        dq[:, t] = scale * np.einsum("bhkv,bhv->bhk", S_after, do[:, t])
        dS = dS + scale * _outer(q[:, t], do[:, t])
        for r in reversed(range(R)):
            S_before = tape.pop()
            error = v[:, t, r] - _read(S_before, k[:, t, r])
            step = beta[:, t, r, :, None]
            written = _read(dS, k[:, t, r])  # cotangent of beta * error
            dbeta[:, t, r] = np.sum(written * error, axis=-1)
            derror = step * written
            dv[:, t, r] = derror
            dk[:, t, r] = np.einsum("bhkv,bhv->bhk", dS, step * error)
            dk[:, t, r] -= np.einsum("bhkv,bhv->bhk", S_before, derror)
            dS = dS - _outer(k[:, t, r], derror)
        S_before = tape.pop()
        dg[:, t] = decay[:, t] * np.sum(dS * S_before, axis=(-1, -2))
        dS = decay[:, t, :, None, None] * dS
        dS = np.where(starts[:, t, None, None, None], 0.0, dS)
    return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "g": dg, "initial_state": dS}


def _wide(x):
    return np.asarray(x).astype(np.float64)


def _read(S, key):
    return np.einsum("bhkv,bhk->bhv", S, key)


def _outer(key, value):
    return key[..., :, None] * value[..., None, :]


def _l2norm(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _l2norm_backward(x, dy):
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return dy / norm - x * np.sum(x * dy, axis=-1, keepdims=True) / norm**3
