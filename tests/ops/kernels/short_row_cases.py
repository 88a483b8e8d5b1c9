"""Kernels of short rows against what JAX derives of what they mean."""

import dataclasses

import jax
import jax.numpy as jnp
from ops.kernels.row_cases import relative_with_nan

from deltaproduct_jax.ops.blocks import logits, rows
from deltaproduct_jax.ops.kernels.triton.short import passes as short_passes

N, D, F, H, V, IDS, EPS = 37, 24, 20, 2, 5, 11, 1e-5


def of_short_rows():
    """Differences, of sizes that no program's rows or columns divide."""
    short_passes.PROGRAMS = 2
    for name, cut in short_passes.CUTS.items():
        columns = 16 if cut.columns else 0
        short_passes.CUTS[name] = dataclasses.replace(cut, rows=16, columns=columns)
    return of_mlp() | of_output() | of_inputs() | of_head() | of_lookup()


def compared(kind, names, got, wanted):
    pairs = zip(names.split(), got, wanted, strict=True)
    return {f"{kind}: {name}": relative_with_nan(x, reference) for name, x, reference in pairs}


def drawn(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def norm(x, scale):
    return rows.norm(x, scale, EPS, x.dtype)


def of_mlp():
    x, more, dout, scale, first, down = drawn(0, *3 * ((N, D),), (D,), (D, 2 * F), (F, D))
    reached, nothing = jnp.arange(N) > 30, jnp.zeros(N, bool)

    def swiglu(z, scale, first, down):
        hidden = norm(z, scale) @ first
        h = jax.nn.silu(hidden[:, :F]) * hidden[:, F:]
        return z + h @ down

    z = x + jnp.where(reached[:, None], jnp.nan, more)
    wanted = z, jnp.mean(z * z, axis=-1), swiglu(z, scale, first, down)
    got = short_passes.mlp(x, more, reached, scale, first, down, eps=EPS)
    found = compared("mlp", "sum mean_square out", got, wanted)

    z = x + more
    _, pull = jax.vjp(swiglu, z, scale, first, down)
    dz, *others = pull(dout)
    arrays = z, jnp.mean(z * z, axis=-1), reached, scale, first, down, dout
    back = lambda *arrays: short_passes.mlp_back(*arrays, eps=EPS)
    got, dscale, y, h, dhidden = back(*arrays)
    got = got, dscale, y.T @ dhidden, h.T @ dout
    wanted = jnp.where(reached[:, None], jnp.nan, dz), *others
    found |= compared("mlp, back", "dz dscale dfirst ddown", got, wanted)
    zero = dout.at[N - 1].set(0)
    got = back(*arrays[:2], nothing.at[N - 1].set(True), *arrays[3:6], zero)[0]
    return found | compared("mlp, back, 0", "dz", [got[N - 1]], [jnp.zeros(D)])


def of_output():
    o, dout, scale, kernel = drawn(1, (N, H, V), (N, D), (V,), (H * V, D))
    wanted, pull = jax.vjp(lambda o, s, w: norm(o, s).reshape(N, -1) @ w, o, scale, kernel)
    got = short_passes.output(o, scale, kernel, eps=EPS)
    found = compared("output", "out", [got], [wanted])
    do, dscale, y = short_passes.output_back(o, scale, kernel, dout, eps=EPS)
    got = do, dscale, y.reshape(N, -1).T @ dout
    return found | compared("output, back", "do dscale dkernel", got, pull(dout))


def of_inputs():
    widths = 7, 40, 33, 3
    cotangents = drawn(2, *((N, width) for width in widths))
    kernels = drawn(3, *((D, width) for width in widths))
    wanted = sum(dy @ w.T for dy, w in zip(cotangents, kernels, strict=True))
    got = short_passes.inputs_back(*cotangents, *kernels)
    return compared("inputs, back", "dx", [got], [wanted])


def of_head():
    x, scale, kernel, dlog_sum, dof_target = drawn(4, (N, D), (D,), (D, IDS), (N,), (N,))
    x, mask = x.at[3].set(jnp.nan).at[30, 2].set(jnp.inf), jnp.arange(N) < 30
    equal = kernel.at[:, 4].set(kernel[:, 2])  # then the smaller is the answer
    targets = jnp.argmax(jnp.nan_to_num(norm(x, scale) @ equal), axis=-1).at[5:9].set(4)
    targets = targets.at[0].add(-IDS).at[1].set(IDS)

    def sums(x, scale, kernel):
        return logits.plain(norm(x, scale) @ kernel, targets, mask)

    arrays = targets, mask
    got = short_passes.head(x, scale, equal, *arrays, eps=EPS)
    found = compared("head", "log-sum target's correct", got, sums(x, scale, equal))
    x, targets = jnp.where(jnp.isfinite(x), x, 1), targets.at[1].set(0)
    wanted, pull = jax.vjp(lambda *given: sums(*given)[:2], x, scale, kernel)
    more = targets, mask, wanted[0], dlog_sum, dof_target
    got = short_passes.head_back(x, scale, kernel, *more, eps=EPS)
    return found | compared("head, back", "dx dscale dkernel", got, pull((dlog_sum, dof_target)))


def of_lookup():
    [dx] = drawn(5, (N, D))
    ids = jax.random.randint(jax.random.key(6), (N,), 0, IDS).at[2].set(IDS).at[3].set(2**31 - 1)
    wanted = jnp.zeros((IDS, D)).at[ids].add(dx, mode="drop")
    got = short_passes.lookup_back(ids, dx, IDS)
    return compared("lookup, back", "dtable", [got], [wanted])


def launched(N=528384):
    """What calls every kernel, and its arrays: by default the paper's state-tracking model's."""
    D, F, H, V, R, IDS = 128, 512, 8, 32, 4, 127
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    wide = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    widths, how = (H * V, R * H * V, R * H * V, R * H), {"eps": EPS}

    def run(x, o, numbers, scale, of_head, first, down, kernel, head, cotangents, kernels):
        reached = numbers > 0
        of_mlp = reached, scale, first, down
        of_ids = head, numbers, reached
        return (
            short_passes.mlp(x, x, *of_mlp, **how),
            short_passes.mlp_back(x, numbers, *of_mlp, x, **how),
            short_passes.output(o, of_head, kernel, **how),
            short_passes.output_back(o, of_head, kernel, x, **how),
            short_passes.inputs_back(*cotangents, *kernels),
            short_passes.head(x, scale, *of_ids, **how),
            short_passes.head_back(x, scale, *of_ids, *3 * (numbers,), **how),
            short_passes.lookup_back(numbers, x, IDS),
        )

    shapes = array(N, D), array(N, H, V), wide(N), wide(D), wide(V)
    shapes += array(D, 2 * F), array(F, D), array(H * V, D), array(D, IDS)
    cotangents = [array(N, width) for width in widths]
    return run, *shapes, cotangents, [array(D, width) for width in widths]
