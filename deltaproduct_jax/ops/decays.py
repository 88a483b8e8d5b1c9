"""Products of decays within a chunk, as exponentials of sums of gates, and their cotangents.

Rows and columns that stand for updates are made so from constant masks: repeating an array over
tokens R times instead would shuffle the lanes and sublanes of a TPU's registers.

Shape suffixes as in chunked.py: N chunks, B batch, H key heads, G value heads per key head, C
tokens in a chunk, M updates in a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.linear import spread
from deltaproduct_jax.ops.precision import Matmul

# exp of anything below is 0 in float64 too, and sums of it over a chunk are finite.
FORGETS = -1e4


class Decays(NamedTuple):
    """Products of decays, 0 across a segment boundary; axes that do not vary have size 1."""

    within: jax.Array  # NBHGCM: from after the token of update m to after token c, if not later
    between: jax.Array  # NBHGMM: from after the token of update n to after that of m, for n < m
    into: jax.Array  # NBHGC: from the start of the chunk to after token c
    into_update: jax.Array  # NBHGM: the same for the tokens of updates
    out: jax.Array  # NBHGM: from after the token of update m to the end of the chunk
    through: jax.Array  # NBHG: from the start of the chunk to its end


def decays_of(
    g_NBHGC, resets_NBC, C: int, R: int, matmul: Matmul, *, by_token: bool = False
) -> Decays:
    """Products of decays between tokens, each the exponential of a sum over its own tokens.

    A difference of two cumulative sums would lose the answer under strong decay. The mask comes
    before exp: outside it the sums mean nothing, and exp of them could overflow. With ``by_token``
    each is found once a pair of tokens and repeated for updates, which is what a CPU does best.
    """
    if by_token and R > 1:
        return _repeated(decays_of(g_NBHGC, resets_NBC, C, 1, matmul), C, R)
    token, update = np.arange(C), np.repeat(np.arange(C), R)
    causal = token[:, None] >= update
    earlier = np.tri(C * R, k=-1, dtype=bool)  # among updates

    def within(rows, mask):
        """Products for the tokens ``rows``, from every update."""
        same = _same_segment(resets_NBC, rows, update)
        if g_NBHGC is None:
            return _lead(mask[None, None] & same).astype(matmul.operand)
        # Row x holds g up to its token; summed over the tokens after c(m), with the constant on the
        # right, where a TPU's matrix unit keeps it.
        upto_NBHGXC = jnp.where(rows[:, None] >= token, spread(g_NBHGC, -2, len(rows)), 0)
        sums = matmul("...xu,um->...xm", upto_NBHGXC, jnp.asarray(token[:, None] > update))
        return _masked_exp(_lead(mask[None, None] & same), sums)

    def along(terms, same):
        """Products over the tokens u for which ``terms`` [C, columns] holds."""
        if g_NBHGC is None:
            return _lead(same).astype(matmul.operand)
        sums = matmul("...u,um->...m", g_NBHGC, jnp.asarray(terms))
        return _masked_exp(_lead(same), sums)

    into = along(token[:, None] <= token, _first_segment(resets_NBC, token))
    return Decays(
        within=within(token, causal),
        between=within(update, earlier),
        into=into,
        into_update=along(token[:, None] <= update, _first_segment(resets_NBC, update)),
        out=along(
            token[:, None] > update, _same_segment(resets_NBC, token[-1:], update)[..., 0, :]
        ),
        through=into[..., -1],
    )


def _repeated(decays: Decays, C: int, R: int) -> Decays:
    """Those of R updates per token, from those of one."""

    def repeated(x, axis):
        if x.shape[axis] == 1 < C:
            return x
        shape = list(x.shape)
        shape[axis] *= R
        return spread(x, axis, R).reshape(shape)

    within = repeated(decays.within, -1)
    earlier = _lead(np.tri(C * R, k=-1, dtype=bool)[None, None])
    return decays._replace(
        within=within,
        between=jnp.where(earlier, repeated(within, -2), 0),
        into_update=repeated(decays.into_update, -1),
        out=repeated(decays.out, -1),
    )


def decays_backward(dlogs: Decays, R: int, matmul: Matmul):
    """Cotangent of g from those of the logarithms of the decays: the same sums, transposed."""
    C = dlogs.into.shape[-1]
    token, update = np.arange(C), np.repeat(np.arange(C), R)

    def within(rows, dlog_NBHGXM):
        dupto_NBHGXC = matmul("...xm,um->...xu", dlog_NBHGXM, jnp.asarray(token[:, None] > update))
        return jnp.sum(jnp.where(rows[:, None] >= token, dupto_NBHGXC, 0), axis=-2)

    def along(mask, dlog_NBHGX):
        return matmul("...x,ux->...u", dlog_NBHGX, jnp.asarray(mask))

    dg_NBHGC = within(token, dlogs.within) + within(update, dlogs.between)
    dg_NBHGC += along(token[:, None] <= token, dlogs.into)
    dg_NBHGC += along(token[:, None] <= update, dlogs.into_update)
    dg_NBHGC += along(token[:, None] > update, dlogs.out)
    return dg_NBHGC + dlogs.through[..., None]


def _same_segment(resets_NBC, rows, columns):
    """[N, B, rows, columns]: whether the tokens lie in one segment; [1, 1, 1, 1] if all do."""
    if resets_NBC is None:
        return np.ones((1, 1, 1, 1), bool)
    segment_NBC = jnp.cumsum(resets_NBC, axis=-1)
    return segment_NBC[..., rows, None] == segment_NBC[..., None, columns]


def _first_segment(resets_NBC, tokens):
    """[N, B, tokens], or [1, 1, tokens] without resets: whether the chunk had no boundary yet."""
    if resets_NBC is None:
        return np.ones((1, 1, len(tokens)), bool)
    return jnp.cumsum(resets_NBC, axis=-1)[..., tokens] == 0


def _lead(mask):
    """Axes for the heads, after those of chunk and batch."""
    return jnp.asarray(mask)[:, :, None, None]


def _masked_exp(mask, x):
    return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def forgets(g: jax.Array | None) -> jax.Array | None:
    """Log decays of which no sum is infinite; exp of each and its gradient are as they were.

    ``-inf`` means to forget everything. To choose where gradients pass is a pass over memory.
    """
    return None if g is None else _at_least_forgets(g)


_at_least_forgets = jax.custom_jvp(lambda g: jnp.maximum(g, jnp.asarray(FORGETS, g.dtype)))
_at_least_forgets.defjvps(lambda tangent, *_: tangent)
