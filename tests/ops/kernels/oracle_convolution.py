"""The short convolution and its gradient in float64, number by number; imports nothing of ours."""

import numpy as np

EPSILON = 1e-6


def short_convolution(u, before, taps, segments, past, cotangent, *, silu, width):
    """``(y, (du, dbefore, dtaps))`` in float64.

    u and cotangent [B, T, C], before [B, W - 1, C], taps [W, C]; segments [B, T] and past
    [B, W - 1] or None; ``width`` channels are divided by their length, or None.
    """
    u, before, taps, cotangent = (np.asarray(x, np.float64) for x in (u, before, taps, cotangent))
    B, T, W = *u.shape[:2], taps.shape[0]
    inputs = np.concatenate([before, u], axis=1)
    ids = np.zeros(inputs.shape[:2])
    if segments is not None:
        ids = np.concatenate([past, segments], axis=1)
    y, dinputs, dtaps = np.zeros_like(u), np.zeros_like(inputs), np.zeros_like(taps)
    for b in range(B):
        for t in range(T):
            seen = [w for w in range(W) if ids[b, t + w] == ids[b, t + W - 1]]
            z = sum(taps[w] * inputs[b, t + w] for w in seen)
            gate = 1 / (1 + np.exp(-z))
            a = z * gate if silu else z
            y[b, t], da = lengths(a, cotangent[b, t], width)
            dz = da * (gate + z * gate * (1 - gate)) if silu else da
            for w in seen:
                dtaps[w] += dz * inputs[b, t + w]
                dinputs[b, t + w] += dz * taps[w]
    return y, (dinputs[:, W - 1 :], dinputs[:, : W - 1], dtaps)


def activated(u, cotangent, *, silu, width):
    """``(y, du)`` in float64, without taps; arrays [B, T, C]."""
    one = np.ones((1, u.shape[-1]))
    nothing = np.zeros((u.shape[0], 0, u.shape[-1]))
    options = {"silu": silu, "width": width}
    y, (du, *_) = short_convolution(u, nothing, one, None, None, cotangent, **options)
    return y, du


def lengths(a, cotangent, width):
    """``a / sqrt(sum(a^2) + EPSILON)`` over every ``width`` numbers, and the cotangent of a."""
    if width is None:
        return a, cotangent
    y, da = np.zeros_like(a), np.zeros_like(a)
    for first in range(0, len(a), width):
        here = slice(first, first + width)
        size = np.sqrt(np.sum(a[here] ** 2) + EPSILON)
        jacobian = np.eye(width) / size - np.outer(a[here], a[here]) / size**3
        y[here], da[here] = a[here] / size, jacobian @ cotangent[here]
    return y, da
