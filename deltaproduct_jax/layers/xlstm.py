"""The two layers of xLSTM (Beck et al., NeurIPS 2024).

mLSTM, a matrix memory that can be read in parallel:

    u, z = x W,  c = silu(conv(u)),  q, k = blocks(c),  v = blocks(u),  i, log f = gates(q, k, v)
    y = ((headnorm(mlstm(q, k, v, i, log f)) + skip * c) * silu(z)) W_o

sLSTM, a scalar memory whose gates see the last output: ``y = headnorm(slstm(x W, R)) W_o``.
"""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.heads import DrawnMixer, DrawnOptions
from deltaproduct_jax.layers.initializers import projection_init
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import segment_runs
from deltaproduct_jax.ops.baselines import (
    MLSTMState,
    SLSTMState,
    mlstm,
    mlstm_step,
    slstm,
    slstm_step,
)
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.baselines.mlstm import mlstm_init
from deltaproduct_jax.ops.baselines.slstm import slstm_init
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.precision import accumulator_dtype, common_dtype

BLOCK = 4  # channels of a block of the block-diagonal projections
# Log of an input gate that lets nothing in.
_CLOSED = -1e30


@exported
class MLSTMLayerState(NamedTuple):
    """What a layer remembers of the tokens so far.

    Attributes:
        recurrent: of the op, see ``ops/baselines/mlstm.py``.
        conv: ``[B, conv_size - 1, channels]``, the last inputs of the convolution.
    """

    recurrent: MLSTMState
    conv: Float[Array, "B past channels"]


def check_blocks(num_heads: int, head_dim: int) -> None:
    """Raises ConfigError unless the channels can be projected in blocks."""
    if num_heads * head_dim % BLOCK:
        raise ConfigError(
            f"num_heads={num_heads} times head_dim={head_dim} must be a multiple of {BLOCK}, the "
            "channels that the mLSTM projects together"
        )


class MLSTM(DrawnMixer[MLSTMLayerState], RecurrentMixer[MLSTMLayerState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``, the inner width ``num_heads * head_dim``.

    There is no extended range: with negative forget gates the normaliser could vanish.

    Args:
        hidden_size: width ``D`` of input and output.
        conv_size: taps of the convolution.
        implementation: how the op is computed: ``"recurrent"``, ``"chunked"``, None for the latter.
        chunk_size: tokens in a chunk of the op; None for 64.
        **shared: as in :class:`DrawnMixer`; ``head_dim`` times ``num_heads`` is a multiple of 4.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations, least_gate = IMPLEMENTATIONS, 0.0

    def __init__(
        self,
        hidden_size: int,
        *,
        conv_size: int = 4,
        implementation: str | None = None,
        chunk_size: int | None = None,
        **shared: Unpack[DrawnOptions],
    ):
        self.conv_size = conv_size
        self.implementation, self.chunk_size = implementation, chunk_size
        super().__init__(hidden_size, **shared)

    def _fit(self):
        check_blocks(self.num_heads, self.head_dim)

    def _make(self, D, make):
        inner = self.num_heads * self.head_dim
        self.u_proj = make.project(D, inner)
        self.z_proj = make.project(D, inner)
        self.conv1d = make.convolve(inner, self.conv_size)
        draw = projection_init(make.initializer, make.initializer_range, BLOCK, BLOCK)
        shape, kind = (inner // BLOCK, BLOCK, BLOCK), make.param_dtype
        blocks = lambda: nnx.Param(draw(make.rngs.params(), shape, kind))
        self.q_blocks, self.k_blocks, self.v_blocks = blocks(), blocks(), blocks()
        # As published: weights of the gates start at 0, forget gates near 1, input gates near 1.
        gate = {"kernel_init": nnx.initializers.zeros, "dtype": accumulator_dtype(self.dtype)}
        gate |= {"param_dtype": kind, "rngs": make.rngs}
        sizes, near_0 = (3 * inner, self.num_heads), nnx.initializers.normal(0.1)
        self.i_proj = nnx.Linear(*sizes, bias_init=near_0, **gate)
        self.f_proj = nnx.Linear(*sizes, bias_init=_forget_bias(make.initial_gate), **gate)
        self.skip = nnx.Param(jnp.ones((inner,), kind))
        self.o_norm = make.head_norm(self.num_heads, self.head_dim)
        self.o_proj = make.project(inner, D)

    def init_state(self, batch_size: int) -> MLSTMLayerState:
        """The state before the first token: all zero."""
        K = self.head_dim
        recurrent = mlstm_init(batch_size, self.num_heads, K, K, self.dtype)
        return MLSTMLayerState(recurrent, self.conv1d.init_state(batch_size, self.dtype))

    def _mix(self, x, state, segment_ids, length):
        (q, k, v, i, log_f), c, conv = self._inputs(x, state.conv, segment_ids, length)
        o, recurrent = mlstm(
            q,
            k,
            v,
            only_counted(i, length, _CLOSED),
            only_counted(log_f, length),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            implementation=self.implementation,
            chunk_size=self.chunk_size,
        )
        return self._output(o, c, x), MLSTMLayerState(recurrent, conv)

    def _token(self, x, state):
        inputs, c, conv = self._inputs(x, state.conv, None, None)
        o, recurrent = mlstm_step(state.recurrent, *(a[:, 0] for a in inputs))
        return self._output(o[:, None], c, x), MLSTMLayerState(recurrent, conv)

    def _inputs(self, x, conv, segment_ids, length):
        """Arguments of the op along T, the convolved inputs, the convolution's state."""
        u = self.u_proj(x)
        c, conv = self.conv1d(u, conv, segment_runs(segment_ids), length)

        def blocks(u, weight):
            split = u.reshape(*u.shape[:2], -1, BLOCK)
            return jnp.einsum("btnc,ncd->btnd", split, weight[...].astype(u.dtype)).reshape(u.shape)

        q, k, v = blocks(c, self.q_blocks), blocks(c, self.k_blocks), blocks(u, self.v_blocks)
        all_three = jnp.concatenate([q, k, v], axis=-1).astype(accumulator_dtype(self.dtype))
        heads = lambda a: a.reshape(*a.shape[:2], self.num_heads, -1)
        log_f = jax.nn.log_sigmoid(self.f_proj(all_three))
        return (heads(q), heads(k), heads(v), self.i_proj(all_three), log_f), c, conv

    def _output(self, o: jax.Array, c: jax.Array, x: jax.Array) -> jax.Array:
        o = self.o_norm(o).reshape(c.shape)
        o = o + self.skip[...].astype(self.dtype)[None, None] * c
        return self.o_proj(o * nnx.silu(self.z_proj(x)))


class SLSTM(DrawnMixer[SLSTMState], RecurrentMixer[SLSTMState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]`` that reads its sequences token by token.

    Without a convolution, as in the formal-language runs of xLSTM. The input map is dense, because
    the cells, ``num_heads * head_dim`` of them, need not be as many as inputs.

    The arguments are those of :class:`DrawnMixer`; ``head_dim`` is the number of cells ``V`` of a
    head, which the recurrent weights mix.
    """

    least_gate = 0.0

    def _make(self, D, make):
        H, V, kind = self.num_heads, self.head_dim, make.param_dtype
        self.x_proj = make.project(D, 4 * H * V)
        # As published: the recurrent weights start at 0, the forget gates near 1.
        self.recurrent = nnx.Param(jnp.zeros((4, H, V, V), kind))
        forget = _forget_bias(make.initial_gate)(make.rngs.params(), (V,), kind)
        self.bias = nnx.Param(jnp.zeros((4, H, V), kind).at[2].set(forget[None]))
        self.o_norm = make.head_norm(H, V)
        self.o_proj = make.project(H * V, D)

    def init_state(self, batch_size: int) -> SLSTMState:
        """The state before the first token: no output, nothing in any cell."""
        return slstm_init(batch_size, self.num_heads, self.head_dim, self.dtype)

    def _mix(self, x, state, segment_ids, length):
        counted = only_counted(jnp.ones(x.shape[:2], bool), length)
        h, state = slstm(
            self._inputs(x),
            self._weights(),
            initial_state=state,
            segment_ids=segment_ids,
            mask=None if length is None else counted,
        )
        return self._output(h), state

    def _token(self, x, state):
        h, state = slstm_step(state, self._inputs(x)[:, 0], self._weights())
        return self._output(h[:, None]), state

    def _weights(self) -> jax.Array:
        weights = self.recurrent[...]  # the op takes none that are narrower than its inputs
        return weights.astype(common_dtype(weights.dtype, self.dtype))

    def _inputs(self, x: jax.Array) -> jax.Array:
        x = self.x_proj(x).reshape(*x.shape[:2], 4, self.num_heads, self.head_dim)
        return x + self.bias[...].astype(self.dtype)[None, None]

    def _output(self, h: jax.Array) -> jax.Array:
        return self.o_proj(self.o_norm(h).reshape(*h.shape[:2], -1))


def _forget_bias(initial_gate: float | None) -> nnx.Initializer:
    """Biases of forget gates: evenly spread over 3 to 6, so that memory starts out long."""
    if initial_gate is not None:
        return nnx.initializers.constant(math.log(initial_gate) - math.log1p(-initial_gate))
    return lambda key, shape, dtype: jnp.linspace(3.0, 6.0, *shape).astype(dtype)


register_mixer(
    "mlstm",
    MLSTM,
    state=MLSTMLayerState,
    check=lambda config: check_blocks(config.num_heads, config.head_dim),
)
register_mixer("slstm", SLSTM, state=SLSTMState)
