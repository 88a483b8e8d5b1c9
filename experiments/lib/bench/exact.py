"""DeltaProduct and its gradient in float64, token by token in NumPy: what errors are against.

    S <- exp(g_t) S;   S <- S + beta_tr k_tr (v_tr - S^T k_tr)^T for r = 1..R;   o_t = scale S^T q_t

Shares no line with the op. The reverse pass differentiates these lines one by one; the states that
it needs are computed again from one in every `BLOCK` tokens, so that long sequences fit in memory.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

BLOCK = 256
Arrays = Mapping[str, np.ndarray]


def outputs(arrays: Arrays, rounded: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Arrays:
    """The forward pass alone.

    Args:
      arrays: q [B, T, H, K], k [B, T, R, H, K], v [B, T, R, H, V], beta [B, T, R, H] and g
        [B, T, H], of any dtype. The state before the first token is zero, the scale K**-0.5.
      rounded: what is done to the operands of every product with the state; by default nothing.

    Returns:
      "o" [B, T, H, V] and "final_state" [B, H, K, V].
    """
    arrays = _wide(arrays)
    o = np.zeros_like(arrays["v"][:, :, 0])
    S = _no_state(arrays)
    for t in range(o.shape[1]):
        (*_, (_, S)) = _steps(S, arrays, t, rounded)
        o[:, t] = _scale(arrays) * _times(rounded(S), arrays["q"][:, t])
    return {"o": o, "final_state": S}


def outputs_and_gradients(
    arrays: Arrays, do: np.ndarray, dfinal: np.ndarray
) -> tuple[Arrays, Arrays]:
    """Outputs as `outputs`, and the gradient of each of ``arrays``.

    Args:
      arrays: as in `outputs`.
      do: cotangent of o [B, T, H, V].
      dfinal: cotangent of the final state [B, H, K, V].
    """
    arrays, do = _wide(arrays), do.astype(np.float64)
    q, k, v, beta, g = (arrays[name] for name in ("q", "k", "v", "beta", "g"))
    T, R, scale = q.shape[1], k.shape[2], _scale(arrays)
    starts = range(0, T, BLOCK)
    states = [_no_state(arrays)]
    for t in range(T):
        (*_, (_, S)) = _steps(states[-1] if t % BLOCK == 0 else S, arrays, t)
        if (t + 1) % BLOCK == 0 and t + 1 < T:
            states.append(S)
    final_state = S
    o = np.zeros_like(do)
    d = {name: np.zeros_like(x) for name, x in arrays.items()}
    dS = dfinal.astype(np.float64)
    for start, S in zip(reversed(starts), reversed(states), strict=True):
        tokens = range(start, min(start + BLOCK, T))
        # Before each factor of each token, after its gate; and after the last.
        before = []
        for t in tokens:
            steps = list(_steps(S, arrays, t))
            before.append([old for old, _ in steps])
            S = steps[-1][1]
            o[:, t] = scale * _times(S, q[:, t])
            before[-1].append(S)
        for t, of_token in zip(reversed(tokens), reversed(before), strict=True):
            d["q"][:, t] = scale * _into(of_token[R], do[:, t])
            dS = dS + scale * _outer(q[:, t], do[:, t])
            for r in reversed(range(R)):
                P, key, step = of_token[r], k[:, t, r], beta[:, t, r, :, None]
                error = v[:, t, r] - _times(P, key)
                of_write = _times(dS, key)
                d["beta"][:, t, r] = (of_write * error).sum(-1)
                d["v"][:, t, r] = step * of_write
                d["k"][:, t, r] = _into(dS, step * error) - _into(P, step * of_write)
                dS = dS - _outer(key, step * of_write)
            d["g"][:, t] = (dS * of_token[0]).sum((-2, -1))
            dS = np.exp(g[:, t])[..., None, None] * dS
    return {"o": o, "final_state": final_state}, d


def _steps(
    S: np.ndarray, arrays: Arrays, t: int, rounded: Callable = lambda x: x
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The state before and after each factor of token t; the gate comes before the first."""
    S = np.exp(arrays["g"][:, t])[..., None, None] * S
    for r in range(arrays["k"].shape[2]):
        key, step = arrays["k"][:, t, r], arrays["beta"][:, t, r, :, None]
        write = step * (arrays["v"][:, t, r] - _times(rounded(S), key))
        after = S + _outer(key, rounded(write))
        yield S, after
        S = after


def _wide(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def _no_state(arrays: Arrays) -> np.ndarray:
    B, _, H, K = arrays["q"].shape
    return np.zeros((B, H, K, arrays["v"].shape[-1]))


def _scale(arrays: Arrays) -> float:
    return arrays["q"].shape[-1] ** -0.5


def _times(S: np.ndarray, key: np.ndarray) -> np.ndarray:
    """S^T k: [B, H, V]."""
    return (key[..., None, :] @ S)[..., 0, :]


def _into(S: np.ndarray, value: np.ndarray) -> np.ndarray:
    """S v: [B, H, K]."""
    return (S @ value[..., None])[..., 0]


def _outer(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """k v^T: [B, H, K, V]."""
    return key[..., :, None] * value[..., None, :]
