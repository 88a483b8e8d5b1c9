"""Kernels of a block outside its mixer, and of logits, against what JAX makes of their meaning."""

import jax
import jax.numpy as jnp
import numpy as np
from ops.kernels.convolution_cases import relative

from deltaproduct_jax.ops.blocks import logits, rows
from deltaproduct_jax.ops.kernels.triton import row_passes


def of_rows():
    """Differences of the kernels of a block outside its mixer from what JAX derives."""
    row_passes.PROGRAMS = 3
    keys = jax.random.split(jax.random.key(0), 6)
    x, dy, after, more = (jax.random.normal(key, (1, 23, 40)) for key in (*keys[:3], keys[5]))
    scale, hidden = 1 + jax.random.normal(keys[3], (40,)), jax.random.normal(keys[4], (1, 23, 80))
    norm = lambda x, scale: rows.norm(x, scale, 1e-5, x.dtype)
    found = {}

    def compare(kind, names, got, wanted):
        for name, x, reference in zip(names.split(), got, wanted, strict=True):
            found[f"{kind}: {name}"] = relative_with_nan(x, reference)

    # What is not finite in a row of the norm, and in rows of what is added to it.
    bad = x.at[0, 5, 7].set(jnp.inf).at[0, 22, 0].set(jnp.nan)[0]
    y = norm(bad, scale)
    _, *got = row_passes.norm_forward(bad, scale, eps=1e-5, looks=True)
    flags = ~jnp.all(jnp.isfinite(y), axis=-1)
    wanted = jnp.where(jnp.isfinite(y), y, 0), jnp.mean(bad * bad, axis=-1), flags
    compare("looking", "y mean_square bad", got, wanted)
    reached = jnp.arange(23) > 20
    total = x[0] + jnp.where(reached[:, None], jnp.nan, more[0])
    how = {"eps": 1e-5, "more": more[0], "reached": reached}
    *got, _ = row_passes.norm_forward(x[0], scale, **how)
    wanted = total, norm(total, scale), jnp.mean(total * total, axis=-1)
    compare("of a sum", "sum y mean_square", got, wanted)

    y, pull = jax.vjp(norm, x, scale)
    dx, dscale = pull(dy)
    mean_square = jnp.mean(x * x, axis=-1)[0]
    arrays, how = (x[0], mean_square, scale, dy[0]), {"eps": 1e-5}
    got = row_passes.norm_back(*arrays, after[0], reached, **how, again=True)
    wanted = jnp.where(reached[:, None], jnp.nan, (dx + after)[0]), dscale, y[0]
    compare("back", "dx dscale y", got, wanted)
    zero = [x.at[22].set(0) for x in (dy[0], after[0])]
    got = row_passes.norm_back(*arrays[:3], *zero, reached, **how)
    compare("back, 0", "dx", [got[0][22]], [jnp.zeros(40)])
    compare("alone, back", "dx dscale", row_passes.norm_back(*arrays, **how)[:2], (dx[0], dscale))
    [dhidden] = jax.vjp(lambda h: jax.nn.silu(h[..., :40]) * h[..., 40:], hidden)[1](dy)
    again = jax.nn.silu(hidden[0, :, :40]) * hidden[0, :, 40:]
    got = row_passes.swiglu_back(hidden[0], dy[0])
    compare("SwiGLU, back", "dhidden h", got, (dhidden[0], again))
    got = row_passes.swiglu_back(hidden[0], dy[0], again=False)[0], row_passes.swiglu(hidden[0])
    compare("SwiGLU", "dhidden h", got, (dhidden[0], again))
    return found


def of_logits():
    """Differences of the kernel of logits from what JAX makes of them, in several turns."""
    row_passes.LOGITS_AT_ONCE = 16
    drawn = 5 * jax.random.normal(jax.random.key(0), (9, 37))
    drawn = drawn.at[3].set(-jnp.inf).at[4, 20].set(jnp.inf).at[5, 30].set(jnp.nan)
    drawn = drawn.at[6, (4, 5)].set(50).at[7, 5].set(-jnp.inf).at[8].set(jnp.nan)
    targets = jnp.argmax(drawn, axis=-1).at[0].set(1).at[6].set(5)
    mask = jnp.arange(9) < 8
    got = row_passes.logit_sums(drawn, targets, mask)
    wanted = logits.plain(drawn, targets, mask)
    names = ("log-sum", "target's", "correct")
    infinite = lambda x: np.where(np.isinf(np.asarray(x, float)), np.nan, np.asarray(x, float))
    pairs = zip(names, map(infinite, got), map(infinite, wanted), strict=True)
    found = {f"logits: {name}": relative_with_nan(x, y) for name, x, y in pairs}
    weights = jax.random.normal(jax.random.key(1), (2, 9))
    arrays = drawn, targets, mask, wanted[0], *weights
    back, wanted = row_passes.logit_back(*arrays), logits.plain_back(*arrays)
    return found | {"logits, back": relative_with_nan(back, *wanted)}


def relative_with_nan(x, reference):
    """The error where both are numbers; infinite where only one is."""
    x, reference = (np.asarray(a, np.float64) for a in (x, reference))
    if not np.array_equal(np.isnan(x), np.isnan(reference)):
        return np.inf
    return relative(*map(np.nan_to_num, (x, reference)))
