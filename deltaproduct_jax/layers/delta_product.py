"""The (Gated) DeltaProduct layer.

Section 3 of the paper (Siems et al., 2025) and the layer of flash-linear-attention, whose parameter
names are kept. Per token, with ``R`` Householder factors:

    q, k, v = act(conv(x W)),  beta = sigmoid(x W_b) [* 2]
    g       = -exp(A_log) softplus(x W_a + dt_bias)
    o       = delta_product(l2norm(q), l2norm(k), v, beta, g)
    y       = (rmsnorm(o) * silu(x W_g)) W_o
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.layers.checks import as_inputs
from deltaproduct_jax.layers.initializers import decay_rate_init, decay_step_init
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import (
    apart,
    convolutions,
    in_parts,
    projections,
    value_width,
)
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import (
    check_convolutions,
    idle_of_convolutions,
    segment_runs,
)
from deltaproduct_jax.ops.api import delta_product, delta_product_step
from deltaproduct_jax.ops.convolution.dispatch import activated
from deltaproduct_jax.ops.convolution.plain import Form, identity
from deltaproduct_jax.ops.convolution.selection import AVAILABLE as CONVOLUTIONS
from deltaproduct_jax.ops.convolution.selection import PLAIN, Choice, choose
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.selection import AVAILABLE, select_implementation

QK_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "none": identity,
}


@exported
class DeltaProductState(NamedTuple):
    """What a layer remembers of the tokens so far.

    Attributes:
        recurrent: ``[B, Hv, K, V]``, float32 (float64 when the layer computes in it).
        q_conv, k_conv, v_conv: ``[B, conv_size - 1, channels]``, the last inputs of each short
            convolution, oldest first; ``[B, 0, 0]`` without convolutions. In the carry of a cell
            any leading axes stand for ``B``.
    """

    recurrent: Float[Array, "*B Hv K V"]
    q_conv: Float[Array, "*B past q_channels"]
    k_conv: Float[Array, "*B past k_channels"]
    v_conv: Float[Array, "*B past v_channels"]


class TokenFactors(NamedTuple):
    """What tokens do to the state of every head.

    Attributes:
        k: ``[B, T, R, H, K]``, before the op makes unit vectors of them.
        v: ``[B, T, R, Hv, V]``, what is written.
        beta: ``[B, T, R, Hv]``, float32 at least.
        g: ``[B, T, Hv]``, log decay, or None without a forget gate.
    """

    k: Float[Array, "B T R H K"]
    v: Float[Array, "B T R Hv V"]
    beta: Float[Array, "B T R Hv"]
    g: Float[Array, "B T Hv"] | None


class GatedDeltaProduct(RecurrentMixer[DeltaProductState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]`` with a DeltaProduct state in every head.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H`` of queries and keys.
        head_dim: key width ``K`` of a head.
        num_v_heads: value heads ``Hv``, a multiple of ``num_heads``; None for ``num_heads``.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        num_householder: Householder factors ``R`` per token (the paper's n_h).
        allow_neg_eigval: beta in (0, 2), eigenvalues in (-1, 1), instead of (0, 1).
        use_forget_gate: a decay for every token and value head.
        use_output_gate: gate the normalised output by ``silu(x W_g)``.
        use_short_conv: causal convolution over ``conv_size`` tokens on q, k and v.
        conv_size: taps of the convolution.
        qk_activation: ``"silu"`` (the paper's) or ``"none"`` on q and k; v always has SiLU.
        beta_bias: starting value of a learnt bias before beta's sigmoid; None for no bias, as in
            the paper. A positive one starts training near reflections.
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        conv_implementation: how the convolutions are computed, and the activations and lengths of
            q and k behind them or without them, ``"plain"`` or ``"triton"``; None chooses, see
            ``select_convolution``.
        implementation: how the op is computed, see ``delta_product``.
        chunk_size: tokens in a chunk of the op; None lets the op choose.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters; those of the forget gate are float32 always.
        rngs: source of the parameter keys.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations = AVAILABLE

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 6,
        head_dim: int = 256,
        num_v_heads: int | None = None,
        expand_v: float = 2.0,
        num_householder: int = 2,
        allow_neg_eigval: bool = True,
        use_forget_gate: bool = True,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        qk_activation: str = "silu",
        beta_bias: float | None = None,
        norm_eps: float = 1e-5,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        conv_implementation: str | None = None,
        implementation: str | None = None,
        chunk_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        value_dim = value_width(num_heads, head_dim, num_v_heads=num_v_heads, expand_v=expand_v)
        require_one_of("qk_activation", qk_activation, QK_ACTIVATIONS)
        require_one_of("conv_implementation", conv_implementation, (None, *CONVOLUTIONS))

        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.num_householder = num_householder
        self.allow_neg_eigval = allow_neg_eigval
        self.use_forget_gate = use_forget_gate
        self.use_output_gate = use_output_gate
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.qk_activation = qk_activation
        self.conv_implementation = conv_implementation
        self.implementation, self.chunk_size = implementation, chunk_size
        self.dtype = jnp.dtype(dtype)

        project = projections(initializer, initializer_range, dtype, param_dtype, rngs)
        convolve = convolutions(initializer, initializer_range, conv_size, param_dtype, rngs)
        R, Hv, V = num_householder, num_v_heads, self.value_dim
        widths = {"q": num_heads * head_dim, "k": R * num_heads * head_dim, "v": R * Hv * V}
        self.q_proj = project(hidden_size, widths["q"])
        self.k_proj = project(hidden_size, widths["k"], parts=R)
        self.v_proj = project(hidden_size, widths["v"], parts=R)
        self.b_proj = project(hidden_size, R * Hv, parts=R)
        if beta_bias is not None:
            self.b_bias = nnx.Param(jnp.full((R * Hv,), beta_bias, param_dtype))
        if use_short_conv:
            for name, width in widths.items():
                act = nnx.silu if name == "v" else QK_ACTIVATIONS[qk_activation]
                setattr(self, f"{name}_conv1d", convolve(width, act))
        if use_forget_gate:
            self.a_proj = project(hidden_size, Hv)
            self.A_log = nnx.Param(decay_rate_init(rngs.params(), (Hv,)))
            self.dt_bias = nnx.Param(decay_step_init(rngs.params(), (Hv,)))
        if use_output_gate:
            self.g_proj = project(hidden_size, Hv * V)
        self.o_norm = RMSNorm(V, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.o_proj = project(Hv * V, hidden_size)

    def init_state(self, batch_size: int) -> DeltaProductState:
        """The state before the first token: all zero."""
        shape = (batch_size, self.num_v_heads, self.head_dim, self.value_dim)
        recurrent = jnp.zeros(shape, accumulator_dtype(self.dtype))
        if self.use_short_conv:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            tails = [conv.init_state(batch_size, self.dtype) for conv in convs]
        else:
            tails = [jnp.zeros((batch_size, 0, 0), self.dtype)] * 3
        return DeltaProductState(recurrent, *tails)

    def _mix(self, x, state, segment_ids, length):
        choice = self._choice(x)
        q, k, v, beta, g, tails = self._inputs(x, state, segment_ids, length, choice)
        o, recurrent = delta_product(
            q,
            k,
            v,
            only_counted(beta, length),
            only_counted(g, length),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            use_qk_l2norm=not choice.may_run_kernel,  # which has seen to it
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        return self._output(o, x), DeltaProductState(recurrent, *tails)

    def _token(self, x, state):
        q, k, v, beta, g, tails = self._inputs(x, state, None, None)
        inputs = jax.tree.map(lambda a: a[:, 0], (q, k, v, beta, g))
        o, recurrent = delta_product_step(state.recurrent, *inputs, use_qk_l2norm=True)
        return self._output(o[:, None], x), DeltaProductState(recurrent, *tails)

    def token_factors(self, x: Float[Array, "B T D"]) -> TokenFactors:
        """What the tokens of whole sequences, read from their start, do to the state."""
        x = as_inputs(x, ("B", "T", "D"), self)
        _, k, v, beta, g, _ = self._inputs(x, self.init_state(x.shape[0]), None, None)
        return TokenFactors(k, v, beta, g)

    def _inputs(
        self,
        x: jax.Array,
        state: DeltaProductState,
        segment_ids: jax.Array | None,
        length: jax.Array | None,
        choice: Choice = PLAIN,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, list[jax.Array]]:
        """q, k, v, beta, g of the op and the convolutions' states after the last token.

        Where the convolutions may run by a kernel, q and k are unit vectors.
        """
        B, T, _ = x.shape
        R, H, Hv, K, V = (
            self.num_householder,
            self.num_heads,
            self.num_v_heads,
            self.head_dim,
            self.value_dim,
        )
        run = segment_runs(segment_ids)
        mixed, tails = [], []
        tails_before = {"q": state.q_conv, "k": state.k_conv, "v": state.v_conv}
        for number, (name, tail) in enumerate(tails_before.items()):
            project = getattr(self, f"{name}_proj")
            read = apart(x, number) if choice.may_run_kernel else x
            u = project(read) if name == "q" or R == 1 else in_parts(project, read, R)
            if self.use_short_conv:
                unit_width = K if choice.may_run_kernel and name != "v" else None
                convolve = getattr(self, f"{name}_conv1d")
                u, tail = convolve(u, tail, run, length, unit_width=unit_width, choice=choice)
            elif name == "v":
                u = nnx.silu(u)
            elif choice.may_run_kernel:
                u = activated(choice, Form(QK_ACTIVATIONS[self.qk_activation], K), u)
            else:
                u = QK_ACTIVATIONS[self.qk_activation](u)
            mixed.append(u)
            tails.append(tail)
        q = mixed[0].reshape(B, T, H, K)
        k = mixed[1].reshape(B, T, R, H, K)
        v = mixed[2].reshape(B, T, R, Hv, V)

        wide = accumulator_dtype(self.dtype)
        b = in_parts(self.b_proj, x, R).astype(wide)
        if hasattr(self, "b_bias"):
            b = b + self.b_bias[...].astype(wide).reshape(R, Hv)[None, None]
        beta = jax.nn.sigmoid(b) * (2.0 if self.allow_neg_eigval else 1.0)
        g = None
        if self.use_forget_gate:
            rate = jnp.exp(self.A_log[...].astype(wide))[None, None]
            a = self.a_proj(x).astype(wide) + self.dt_bias[...].astype(wide)[None, None]
            g = -rate * jax.nn.softplus(a)
        return q, k, v, beta, g, tails

    def _choice(self, x: jax.Array) -> Choice:
        """What the convolutions of ``x`` run by, or what stands behind them without any."""
        (B, T, _), K = x.shape, self.head_dim
        sizes = {"B": B, "T": T, "R": self.num_householder, "H": self.num_heads, "K": K}
        sizes |= {"Hv": self.num_v_heads, "V": self.value_dim}
        fixed = {"dtype": self.dtype, "chunk_size": self.chunk_size}
        op = self.implementation or select_implementation(
            "cuda", **sizes, **fixed, differentiated=True
        )
        forms = [Form(QK_ACTIVATIONS[self.qk_activation], K)]
        forms += [Form(nnx.silu)] if self.use_short_conv else []
        taps = self.conv_size if self.use_short_conv else None
        given = {"B": B, "T": T, "conv_size": taps, "dtype": self.dtype}
        return choose(self.conv_implementation, tuple(forms), op=op, **given)

    def _output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """Norm, gate and output projection of ``o [B, T, Hv, V]``."""
        o = self.o_norm(o)
        if self.use_output_gate:
            o = o * nnx.silu(self.g_proj(x).reshape(o.shape))
        return self.o_proj(o.reshape(*o.shape[:2], -1))


def _check_one_factor(config: Any) -> None:
    if config.num_householder not in (None, 1):
        raise ConfigError(
            f"num_householder={config.num_householder} does not fit mixer={config.mixer!r}, which "
            "has one factor per token; give num_householder=1 or a delta_product mixer"
        )
    check_convolutions(config)


def _register(name: str, gated: bool, one_factor: bool) -> None:
    # The paper's state-tracking models: values as wide as keys, neither gate nor convolution.
    defaults = {"expand_v": 1.0, "use_output_gate": False, "use_short_conv": False}
    register_mixer(
        name,
        GatedDeltaProduct,
        state=DeltaProductState,
        defaults=defaults | ({"num_householder": 1} if one_factor else {}),
        fixed={"use_forget_gate": gated},
        check=_check_one_factor if one_factor else check_convolutions,
        idle=lambda values: [
            *idle_of_convolutions(values),
            *(["num_householder"] if one_factor else []),
        ],
    )


_register("delta_net", gated=False, one_factor=True)
_register("gated_delta_net", gated=True, one_factor=True)
_register("delta_product", gated=False, one_factor=False)
_register("gated_delta_product", gated=True, one_factor=False)
