"""The mixers' layers in float64 NumPy, one row, token by token; imports nothing of ours.

Each takes the parameters by name, such as ``p["q_proj.kernel"]``, and inputs ``[T, D]``.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def head_norm(x, scale, eps, bias=0.0):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale + bias


def conv(x, taps):
    W = len(taps)
    padded = np.concatenate([np.zeros((W - 1, x.shape[1])), x])
    return np.array([np.sum(padded[t : t + W] * taps, axis=0) for t in range(len(x))])


def transformer(p, x, H, K, V, eps, extended, Hk=None, window=None, theta=10_000.0):
    T = len(x)
    q, k, v = (
        (x @ p[f"{n}_proj.kernel"] + p.get(f"{n}_proj.bias", 0))
        .reshape(T, H if n == "q" or Hk is None else Hk, -1)
        .astype(complex if n != "v" else float)
        for n in "qkv"
    )
    # A rotation of pairs of channels is a product of complex numbers.
    turn = np.exp(1j * np.arange(T)[:, None] * theta ** (-np.arange(K // 2) / (K // 2)))
    q, k = ((u[..., : K // 2] + 1j * u[..., K // 2 :]) * turn[:, None] for u in (q, k))
    y = np.zeros((T, H, V))
    for t in range(T):
        first = 0 if window is None else max(0, t + 1 - window)
        for h in range(H):
            of = h if Hk is None else h // (H // Hk)
            scores = np.array([(q[t, h] @ k[s, of].conj()).real for s in range(first, t + 1)])
            weights = np.exp(scores / K**0.5)
            y[t, h] = weights @ v[first : t + 1, of] / weights.sum()
    return y.reshape(T, -1) @ p["o_proj.kernel"]


def gla(p, x, H, K, V, eps, extended):
    T = len(x)
    heads = lambda u: u.reshape(T, H, -1)
    q, k, v = (heads(x @ p[f"{n}_proj.kernel"]) for n in "qkv")
    gate = x @ p["gate_down.kernel"] @ p["gate_up.kernel"] + p["gate_up.bias"]
    alpha = heads(sigmoid(gate) ** (1 / 16))
    alpha = 2 * alpha - 1 if extended else alpha
    S, o = np.zeros((H, K, V)), np.zeros((T, H, V))
    for t in range(T):
        S = alpha[t][..., None] * S + k[t][..., None] * v[t][:, None]
        o[t] = np.einsum("hkv,hk->hv", S, q[t]) * K**-0.5
    o = rms_norm(o, p["o_norm.scale"], eps) * silu(heads(x @ p["g_proj.kernel"]))
    return o.reshape(T, -1) @ p["o_proj.kernel"]


def mamba2(p, x, H, K, V, eps, extended):
    T, Hv = len(x), len(p["A_log"])
    xbc = silu(conv(x @ p["xbc_proj.kernel"], p["xbc_conv1d.weight"]))
    u, k, q = np.split(xbc, [Hv * V, Hv * V + H * K], axis=1)
    u = u.reshape(T, Hv, V)
    k, q = (np.repeat(a.reshape(T, H, K), Hv // H, axis=1) for a in (k, q))
    dt = softplus(x @ p["dt_proj.kernel"] + p["dt_bias"])
    alpha = np.exp(-np.exp(p["A_log"]) * dt)
    alpha = 2 * alpha - 1 if extended else alpha
    S, o = np.zeros((Hv, K, V)), np.zeros((T, Hv, V))
    for t in range(T):
        S = alpha[t][:, None, None] * S + k[t][..., None] * (dt[t][:, None] * u[t])[:, None]
        o[t] = np.einsum("hkv,hk->hv", S, q[t]) + p["D"][:, None] * u[t]
    o = o.reshape(T, -1) * silu(x @ p["z_proj.kernel"])
    return rms_norm(o, p["o_norm.scale"], eps) @ p["o_proj.kernel"]


def mlstm(p, x, H, K, V, eps, extended):
    T = len(x)
    u, z = x @ p["u_proj.kernel"], x @ p["z_proj.kernel"]
    c = silu(conv(u, p["conv1d.weight"]))
    q, k, v = (
        np.concatenate([a[:, 4 * n : 4 * n + 4] @ w for n, w in enumerate(p[f"{name}_blocks"])], 1)
        for name, a in (("q", c), ("k", c), ("v", u))
    )
    three = np.concatenate([q, k, v], axis=1)
    i = np.exp(three @ p["i_proj.kernel"] + p["i_proj.bias"])
    f = sigmoid(three @ p["f_proj.kernel"] + p["f_proj.bias"])
    q, k, v = q.reshape(T, H, K), k.reshape(T, H, K) / K**0.5, v.reshape(T, H, K)
    S, n, m, o = np.zeros((H, K, K)), np.zeros((H, K)), np.zeros(H), np.zeros((T, H, K))
    for t in range(T):
        m = np.maximum(np.log(f[t]) + m, np.log(i[t]))
        S = f[t][:, None, None] * S + (i[t][:, None] * k[t])[..., None] * v[t][:, None]
        n = f[t][:, None] * n + i[t][:, None] * k[t]
        weight = np.maximum(np.abs(np.sum(n * q[t], axis=1)), 1.0) + 1e-6 * np.exp(m)
        o[t] = np.einsum("hkv,hk->hv", S, q[t]) / weight[:, None]
    o = head_norm(o, p["o_norm.scale"], eps).reshape(T, -1) + p["skip"] * c
    return (o * silu(z)) @ p["o_proj.kernel"]


def slstm(p, x, H, K, V, eps, extended):
    T = len(x)
    given = (x @ p["x_proj.kernel"]).reshape(T, 4, H, K) + p["bias"]
    c, n, h, out = np.zeros((H, K)), np.zeros((H, K)), np.zeros((H, K)), np.zeros((T, H, K))
    for t in range(T):
        z, i, f, o = given[t] + np.einsum("hu,ghuv->ghv", h, p["recurrent"])
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        out[t] = h = sigmoid(o) * c / n
    return head_norm(out, p["o_norm.scale"], eps).reshape(T, -1) @ p["o_proj.kernel"]


def rwkv7(p, x, H, K, V, eps, extended, v_first=None):
    T = len(x)
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    blend = lambda name: x + (before - x) * p[f"x_{name}"]
    heads = lambda u: u.reshape(T, H, -1)

    def lora(name, of, activation=lambda u: u):
        low = activation(blend(of) @ p[f"{name}_lora.down.kernel"])
        return low @ p[f"{name}_lora.up.kernel"] + p.get(f"{name}_lora.bias", 0.0)

    r, k, v = (heads(blend(n) @ p[f"{n}_proj.kernel"]) for n in "rkv")
    w = np.exp(-np.exp(-0.5) * sigmoid(heads(lora("w", "w", np.tanh))))
    a = sigmoid(heads(lora("a", "a")))
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(heads(lora("v", "v")))
    kk = k * p["k_k"]
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * p["k_a"])
    S, o = np.zeros((H, K, V)), np.zeros((T, H, V))
    for t in range(T):
        for h in range(H):
            rank_one = np.outer(a[t, h] * kk[t, h], kk[t, h])
            A = np.diag(w[t, h]) - (2 if extended else 1) * rank_one
            S[h] = A @ S[h] + np.outer(k[t, h], v[t, h])
            o[t, h] = S[h].T @ r[t, h]
    o = head_norm(o, p["o_norm.scale"], K * eps, p["o_norm.bias"])
    o = o + np.sum(r * p["r_k"] * k, axis=-1, keepdims=True) * v
    return (o.reshape(T, -1) * lora("g", "g", sigmoid)) @ p["o_proj.kernel"]


def delta_product(p, x, H, K, V, eps, extended):
    T, R = len(x), p["k_proj.kernel"].shape[1] // (H * K)
    Hv = p["v_proj.kernel"].shape[1] // (R * V)
    q, k, v = (silu(conv(x @ p[f"{n}_proj.kernel"], p[f"{n}_conv1d.weight"])) for n in "qkv")
    q, k = np.repeat(q.reshape(T, H, K), Hv // H, 1), np.repeat(k.reshape(T, R, H, K), Hv // H, 2)
    q, k = (u / np.sqrt(np.sum(u**2, axis=-1, keepdims=True) + 1e-6) for u in (q, k))
    v = v.reshape(T, R, Hv, V)
    beta = sigmoid(x @ p["b_proj.kernel"] + p["b_bias"]).reshape(T, R, Hv)
    beta = 2 * beta if extended else beta
    decay = np.ones((T, Hv))
    if "A_log" in p:
        decay = np.exp(-np.exp(p["A_log"]) * softplus(x @ p["a_proj.kernel"] + p["dt_bias"]))
    o = np.zeros((T, Hv, V))
    for h in range(Hv):
        S = np.zeros((K, V))
        for t in range(T):
            S = decay[t, h] * S
            for r in range(R):
                key = k[t, r, h]
                S = S - beta[t, r, h] * np.outer(key, key @ S - v[t, r, h])
            o[t, h] = q[t, h] @ S * K**-0.5
    gate = silu(x @ p["g_proj.kernel"])
    return (rms_norm(o, p["o_norm.scale"], eps).reshape(T, -1) * gate) @ p["o_proj.kernel"]


def kimi(p, x, H, K, V, extended, decay):
    T, Hv = len(x), len(p["A_log"])
    twice = 2 if extended else 1
    unit = lambda u: u / np.sqrt(np.sum(u**2, axis=-1, keepdims=True) + 1e-6)
    q, k, v = (silu(conv(x @ p[f"{n}_proj.kernel"], p[f"{n}_conv1d.weight"])) for n in "qkv")
    q, k = (unit(np.repeat(u.reshape(T, H, K), Hv // H, 1)) for u in (q, k))
    v = v.reshape(T, Hv, V)
    size = lambda n: twice * sigmoid(x @ p[f"{n}_proj.kernel"] + p[f"{n}_bias"])
    beta, alpha, o = size("b"), decay(np.exp(p["A_log"])[:, None]), np.zeros((T, Hv, V))
    if "c_bias" in p:
        e, gamma = unit(by_heads(p, "erase", x, Hv)), size("c")
    for h in range(Hv):
        S = np.zeros((K, V))
        for t in range(T):
            S = np.diag(alpha[t, h]) @ S
            if "c_bias" in p:
                S = (np.eye(K) - gamma[t, h] * np.outer(e[t, h], e[t, h])) @ S
            S = (np.eye(K) - beta[t, h] * np.outer(k[t, h], k[t, h])) @ S
            S = S + beta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = S.T @ q[t, h] / K**0.5
    return o


def gated(p, x, o, eps):
    gate = x @ p["output_gate_down.kernel"] @ p["output_gate_up.kernel"] + p["output_gate_up.bias"]
    o = rms_norm(o, p["o_norm.scale"], eps).reshape(len(x), -1)
    return (o * sigmoid(gate)) @ p["o_proj.kernel"]


def by_heads(p, name, x, H):
    low = (x @ p[f"{name}.down.kernel"]).reshape(len(x), H, -1)
    return np.stack([low[:, h] @ p[f"{name}.up"][h] for h in range(H)], axis=1)


def channels(p, x):
    f = x @ p["gate_down.kernel"] @ p["gate_up.kernel"] + p["dt_bias"]
    return f.reshape(len(x), len(p["A_log"]), -1)


def kimi_delta_attention(p, x, H, K, V, eps, extended):
    decay = lambda rate: np.exp(-rate * softplus(channels(p, x)))
    return gated(p, x, kimi(p, x, H, K, V, extended, decay), eps)


def complex_kimi_delta_attention(p, x, H, K, V, eps, extended):
    def decay(rate):
        a, least = 2 * sigmoid(rate * channels(p, x)) - 1, np.exp(-5)
        return np.sign(a) * (least + (1 - least) * np.abs(a))

    return gated(p, x, kimi(p, x, H, K, V, extended, decay), eps)


def erase_then_delta(p, x, H, K, V, eps, extended):
    f = by_heads(p, "decay", x, len(p["A_log"])) + p["dt_bias"].reshape(-1, K)
    decay = lambda rate: np.exp(-5 + 5 * np.exp(-rate * softplus(f) / 5))
    return gated(p, x, kimi(p, x, H, K, V, extended, decay), eps)


# One layer: the number of factors is read from the keys, the forget gate from its parameters.
gated_delta_product = delta_net = gated_delta_net = delta_product
