"""The baselines' recurrences in float64 NumPy, token by token; imports nothing of ours."""

import numpy as np


def _new(segment_ids, b, t):
    """True at the first token of a later segment."""
    return segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]


def _each(shape):
    B, T, H = shape
    return ((b, h, range(T)) for b in range(B) for h in range(H))


def _of_states(transition, size, q, k, v, scale, initial_state, segment_ids):
    """``S <- transition S + size k v^T``, outputs ``scale S^T q``, both functions of (b, t, h)."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    o, final = np.zeros((B, T, H, V)), np.zeros((B, H, K, V))
    for row, h, tokens in _each((B, T, H)):
        S = np.zeros((K, V)) if initial_state is None else initial_state[row, h]
        for t in tokens:
            if _new(segment_ids, row, t):
                S = np.zeros((K, V))
            at = (row, t, h)
            S = transition(at) @ S + size(at) * np.outer(k[at], v[at])
            o[at] = scale * S.T @ q[at]
        final[row, h] = S
    return o, final


def linear(q, k, v, gate, *, a=None, b=None, scale=None, initial_state=None, segment_ids=None):
    """``S <- (diag(gate) + b a^T) S + k v^T``; gate, not its log, is [B, T, H] or [B, T, H, K]."""
    if gate.ndim == 3:
        gate = np.repeat(gate[..., None], q.shape[-1], axis=3)

    def transition(at):
        A = np.diag(gate[at])
        return A if a is None else A + np.outer(b[at], a[at])

    return _of_states(transition, lambda at: 1.0, q, k, v, scale, initial_state, segment_ids)


def channel_delta(
    q, k, v, beta, gate, *, e=None, gamma=None, scale=None, initial_state=None, segment_ids=None
):
    """``S <- (I - beta k k^T) (I - gamma e e^T) diag(gate) S + beta k v^T``; gate, not its log."""
    unit = np.eye(q.shape[-1])

    def transition(at):
        A = np.diag(gate[at])
        if e is not None:
            A = (unit - gamma[at] * np.outer(e[at], e[at])) @ A
        return (unit - beta[at] * np.outer(k[at], k[at])) @ A

    return _of_states(transition, lambda at: beta[at], q, k, v, scale, initial_state, segment_ids)


def mlstm(q, k, v, i, log_f, *, segment_ids=None):
    """Outputs by the definition without a stabiliser, whose 1e-6 alone needs it."""
    B, T, H, K = q.shape
    o = np.zeros((B, T, H, v.shape[-1]))
    for row, h, tokens in _each((B, T, H)):
        S, n, m = np.zeros((K, v.shape[-1])), np.zeros(K), 0.0
        for t in tokens:
            if _new(segment_ids, row, t):
                S, n, m = 0 * S, 0 * n, 0.0
            f, write = np.exp(log_f[row, t, h]), np.exp(i[row, t, h])
            m = max(log_f[row, t, h] + m, i[row, t, h])
            key = k[row, t, h] / np.sqrt(K)
            S = f * S + write * np.outer(key, v[row, t, h])
            n = f * n + write * key
            weight = max(abs(n @ q[row, t, h]), 1.0) + 1e-6 * np.exp(m)
            o[row, t, h] = S.T @ q[row, t, h] / weight
    return o


def slstm(x, recurrent, *, segment_ids=None):
    """Outputs by the definition without a stabiliser."""
    B, T, _, H, V = x.shape
    sigmoid = lambda u: 1 / (1 + np.exp(-u))
    out = np.zeros((B, T, H, V))
    for row, head, tokens in _each((B, T, H)):
        c, n, h = np.zeros(V), np.zeros(V), np.zeros(V)
        for t in tokens:
            if _new(segment_ids, row, t):
                c, n, h = 0 * c, 0 * n, 0 * h
            z, i, f, o = (x[row, t, gate, head] + h @ recurrent[gate, head] for gate in range(4))
            c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
            n = sigmoid(f) * n + np.exp(i)
            h = sigmoid(o) * c / n
            out[row, t, head] = h
    return out
