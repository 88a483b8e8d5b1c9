"""The scalar memory of xLSTM (Beck et al., 2024), whose gates see the last output.

    z, i, f, o = x_t + R h_{t-1}                          four pre-activations of every cell
    m_t = max(log sigmoid(f) + m_{t-1}, i),   f' = exp(log sigmoid(f) + m_{t-1} - m_t)
    c_t = f' c_{t-1} + i' tanh(z),   n_t = f' n_{t-1} + i',   i' = exp(i - m_t)
    h_t = sigmoid(o) c_t / n_t

R mixes the cells of a head. The gates are not linear in the state, so there is no parallel form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from deltaproduct_jax.ops.baselines import chunks
from deltaproduct_jax.ops.baselines.checks import check_arrays, fields_of
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.parts import on_each_part
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

# m before the first token: far below any gate, so that the first token alone sets the scale, and
# finite, so that differences are. c / n is the same for every m that does not underflow.
_NO_TOKEN = -1e30


@exported
class SLSTMState(NamedTuple):
    """State of every cell, each ``[B, H, V]``, in float32 at least.

    Attributes:
        cell: c, divided by exp(m).
        normalizer: n, divided by exp(m); 0 before the first token and at least 1 after it.
        stabilizer: m.
        hidden: h, the last output.
    """

    cell: Float[Array, "B H V"]
    normalizer: Float[Array, "B H V"]
    stabilizer: Float[Array, "B H V"]
    hidden: Float[Array, "B H V"]


def slstm_init(B: int, H: int, V: int, dtype: jax.typing.DTypeLike) -> SLSTMState:
    """The state before the first token of inputs of ``dtype``."""
    zero = jnp.zeros((B, H, V), accumulator_dtype(dtype))
    return SLSTMState(zero, zero, jnp.full_like(zero, _NO_TOKEN), zero)


def slstm(
    x: Float[Array, "B T 4 H V"],
    recurrent: Float[Array, "4 H V V"],
    *,
    initial_state: SLSTMState | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], SLSTMState]:
    """sLSTM over whole sequences, token by token.

    Args:
        x: what the inputs give to the pre-activations z, i, f, o, in this order.
        recurrent: R, ``recurrent[gate, head, from, to]``.
        initial_state: state before the first token; None for an empty one. It continues each row's
            first segment.
        segment_ids: sequence that each token belongs to; the state starts anew where it changes.
        mask: False at tokens that leave the state as it is; their outputs mean nothing.

    Returns:
        ``(h, final_state)``, in the dtype of ``x``, and in float32 at least.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    _check(x, recurrent, initial_state, "initial_state", segment_ids, mask)
    arrays = {"x": x, "recurrent": recurrent}
    arrays |= {} if initial_state is None else initial_state._asdict()
    of_state = SLSTMState(*[("B", "H", "V")] * 4)
    return on_each_part(
        _run,
        arrays | {"segment_ids": segment_ids, "mask": mask},
        {"x": ("B", "T", "gates", "H", "V"), "recurrent": ("gates", "H", "V", "V")}
        | of_state._asdict()
        | {"segment_ids": ("B", "T"), "mask": ("B", "T")},
        (("B", "T", "H", "V"), of_state),
    )


def _run(arrays):
    x, recurrent, *of_state, segment_ids, mask = arrays.values()
    B, _, _, H, V = x.shape
    empty = slstm_init(B, H, V, x.dtype)
    state = SLSTMState(*of_state) if of_state else empty
    if 0 in x.shape:
        return x[:, :, 0], state

    def step(state, x, keep):
        h, after = _step(state, x, recurrent)
        return h, after if keep is None else chunks.where_rows(keep, after, state)

    return chunks.scan_tokens(step, state, empty, (x, mask), segment_ids)


def slstm_step(
    state: SLSTMState, x: Float[Array, "B 4 H V"], recurrent: Float[Array, "4 H V V"]
) -> tuple[Float[Array, "B H V"], SLSTMState]:
    """One token: returns the output and the state after it; see :func:`slstm`."""
    _check(x, recurrent, state, "state", None, None, one_token=True)
    return _step(state, x, recurrent)


def _check(x, recurrent, state, state_name, segment_ids, mask, one_token=False) -> None:
    arrays = {"x": (x, "B T gates H V"), "recurrent": (recurrent, "gates H V V")}
    if state is not None or one_token:
        fields = fields_of(state_name, state, SLSTMState)
        arrays |= {name: (array, "B H V") for name, array in fields.items()}
    arrays |= {"segment_ids": (segment_ids, "B T"), "mask": (mask, "B T")}
    check_arrays(arrays, one_token)
    if recurrent.shape[0] != 4:
        raise ValueError(f"recurrent must have 4 gates z, i, f, o, got {recurrent.shape[0]}")


def _step(state: SLSTMState, x, recurrent):
    wide = accumulator_dtype(x.dtype)
    mixed = Matmul.wide(x.dtype, None)("bhu,ghuv->bghv", state.hidden, recurrent)
    z, i, f, o = jnp.moveaxis(x.astype(wide) + mixed, 1, 0)
    log_f = jax.nn.log_sigmoid(f)
    m = jnp.maximum(log_f + state.stabilizer, i)
    forget, write = jnp.exp(log_f + state.stabilizer - m), jnp.exp(i - m)
    cell = forget * state.cell + write * jnp.tanh(z)
    normalizer = forget * state.normalizer + write
    hidden = jax.nn.sigmoid(o) * cell / normalizer
    return hidden.astype(x.dtype), SLSTMState(cell, normalizer, m, hidden)
