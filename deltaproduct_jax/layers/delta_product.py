"""The (Gated) DeltaProduct layer.

Section 3 of the paper (Siems et al., 2025) and the layer of flash-linear-attention, whose parameter
names are kept. Per token, with ``R`` Householder factors:

    q, k, v = act(conv(x W)),  beta = sigmoid(x W_b) [* 2]
    g       = -exp(A_log) softplus(x W_a + dt_bias)
    o       = delta_product(l2norm(q), l2norm(k), v, beta, g)
    y       = (rmsnorm(o) * silu(x W_g)) W_o
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.layers.checks import as_inputs
from deltaproduct_jax.layers.delta_rule import DeltaRuleMixer, TokenFactors
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import (
    apart,
    by_devices,
    head_devices,
    in_parts,
    joined_kernel,
)
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import (
    check_convolutions,
    idle_of_convolutions,
    last_inputs,
    segment_runs,
)
from deltaproduct_jax.ops.api import delta_product, delta_product_step
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.convolution.dispatch import POINT, READ_POINT, convolved_parts
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.convolution.raw import takes_raw
from deltaproduct_jax.ops.convolution.selection import AVAILABLE as CONVOLUTIONS
from deltaproduct_jax.ops.convolution.selection import PLAIN, Choice, Convolution, choose
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.parts import explicit_names, placement, taken_apart, with_past
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.selection import AVAILABLE, select_implementation


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


# Of a gate that may hardly decay at all, as in the official code.
LEAST_RATE = float(jnp.finfo(jnp.float32).tiny)


class GatedDeltaProduct(DeltaRuleMixer[DeltaProductState]):
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
        initial_gate: what every forget gate keeps of a state in a token before training, in (0, 1);
            None for the published start.
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        conv_implementation: how the convolutions are computed, and the activations and lengths of
            q and k behind them or without them: ``"plain"``, or by a kernel, ``"triton"`` or
            ``"pallas_tpu"``; None chooses, see ``select_convolution``.
        implementation: how the op is computed, see ``delta_product``.
        chunk_size: tokens in a chunk of the op; None lets the op choose.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters; those of the forget gate are float32 always.
        rngs: source of the parameter keys.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations, least_gate = AVAILABLE, 0.0

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
        initial_gate: float | None = None,
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
        require_one_of("conv_implementation", conv_implementation, (None, *CONVOLUTIONS))
        self.num_householder, self.use_forget_gate = num_householder, use_forget_gate
        if initial_gate is not None and not use_forget_gate:
            raise ConfigError(
                f"initial_gate={initial_gate!r} means nothing without use_forget_gate; leave it "
                "none"
            )
        self.conv_implementation = conv_implementation
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_v_heads=num_v_heads,
            expand_v=expand_v,
            allow_neg_eigval=allow_neg_eigval,
            use_output_gate=use_output_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            qk_activation=qk_activation,
            beta_bias=beta_bias,
            initial_gate=initial_gate,
            norm_eps=norm_eps,
            initializer=initializer,
            initializer_range=initializer_range,
            implementation=implementation,
            chunk_size=chunk_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def _make(self, D, make):
        keys, values = self._widths()
        R, Hv = self.num_householder, self.num_v_heads
        widths = {"q": keys, "k": R * keys, "v": R * values}
        self.q_proj = make.project(D, widths["q"])
        self.k_proj = make.project(D, widths["k"], parts=R)
        self.v_proj = make.project(D, widths["v"], parts=R)
        self.b_proj = make.project(D, R * Hv, parts=R)
        for name, width in widths.items():
            self._make_convolution(make, name, width)
        if self.use_forget_gate:
            self.a_proj = make.project(D, Hv)
            self._make_decay(make, Hv, least=LEAST_RATE)
        if self.use_output_gate:
            self.g_proj = make.project(D, values)
        self.o_norm = make.rms_norm(self.value_dim)
        self.o_proj = make.project(values, D)

    def init_state(self, batch_size: int) -> DeltaProductState:
        """The state before the first token: all zero."""
        return DeltaProductState(self._no_matrices(batch_size), *self._no_inputs(batch_size))

    def _mix(self, x, state, segment_ids, length):
        choice = self._choice(x)
        raw = self._gives_raw(x, choice)
        x = checkpoint_name(x, READ_POINT) if self._reads_in_place(x, choice) else x
        q, k, v, beta, g, tails = self._inputs(x, state, segment_ids, length, choice, raw)
        o, recurrent = delta_product(
            q,
            k,
            v,
            only_counted(beta, length),
            only_counted(g, length),
            use_qk_l2norm=raw or not choice.may_run_kernel,  # which has seen to it
            use_silu=raw,
            **self._options(state, segment_ids),
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
        raw: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, list[jax.Array]]:
        """q, k, v, beta, g of the op and the convolutions' states after the last token.

        Where kernels may run q and k are unit vectors; if ``raw`` the op activates all three.
        """
        B, T, _ = x.shape
        R, H, Hv = self.num_householder, self.num_heads, self.num_v_heads
        K, V = self.head_dim, self.value_dim

        def read(name):
            project = getattr(self, f"{name}_proj")
            own = apart(x, "qkv".index(name)) if choice.may_run_kernel else x
            return project(own) if name == "q" or R == 1 else in_parts(project, own, R)

        if self._reads_in_place(x, choice):
            q, k, v, beta, tails = self._read_together(x, state, segment_ids, length, choice)
            return q, k, v, beta, self._decay(x) if self.use_forget_gate else None, tails

        if raw and x.dtype == self.dtype and rows.takes_products(x):
            matrices = [m.kernel[...].astype(x.dtype) for m in self._joined_maps()[0]]
            q, k, v, b = (checkpoint_name(y, POINT) for y in rows.products(x, matrices))
            b, tails = b.reshape(B, T, R, Hv), [*state[1:]]
        else:
            units = {"unit_width": K if choice.may_run_kernel else None, "choice": choice}
            convolved = functools.partial(
                self._convolved, read, state, segment_ids, length, **units
            )
            (q, k, v), tails = (map(read, "qkv"), [*state[1:]]) if raw else convolved()
            b = in_parts(self.b_proj, x, R)
        q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, R, H, K), v.reshape(B, T, R, Hv, V)
        return q, k, v, self._sizes(b), self._decay(x) if self.use_forget_gate else None, tails

    def _reads_in_place(self, x: jax.Array, choice: Choice) -> bool:
        """Whether one product makes q, k, v and beta, which a kernel reads where they lie."""
        spread, (B, T, _) = placement(), x.shape
        values = self.num_householder * self.num_v_heads * self.value_dim
        divides = lambda heads: spread is None or spread.own_heads(B, T, heads) is not None
        return (
            self.use_short_conv
            and choice.on_cuda == "triton"
            and divides(self.num_heads)
            and divides(self.num_v_heads)
            and values % (self.head_dim * head_devices()) == 0
            and not any(explicit_names(x))
        )

    def _read_together(
        self,
        x: jax.Array,
        state: DeltaProductState,
        segment_ids: jax.Array | None,
        length: jax.Array | None,
        choice: Choice,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]:
        """What `_inputs` returns but the decay, of one product."""
        B, T, _ = x.shape
        R, H, Hv, K = self.num_householder, self.num_heads, self.num_v_heads, self.head_dim
        (_, sizes), devices = self._joined_maps(), head_devices()
        joined = getattr(self, "joined", None) or self.joined_kernels()
        kernel, taps = joined["qkvb"][...], joined["taps"][...]
        u = jax.lax.dot_general(x.astype(self.dtype), kernel, (((2,), (0,)), ((), ())))
        before = by_devices(state[1:], sizes).astype(u.dtype)
        run = segment_runs(segment_ids)
        past = None if run is None else jnp.zeros(before.shape[:2], run.dtype)
        forms = tuple(Form(self._activation(name), None if name == "v" else K) for name in "qkv")
        widths = tuple(n * width // devices for n, width in sizes[:3])

        def convolved(arrays, before, taps):
            (u, run), (old, past) = arrays, before
            q, k, v, b = convolved_parts(choice, forms, widths, u, old, taps, run, past)
            in_factors = lambda x: x.reshape(*x.shape[:2], R, -1)
            return q, in_factors(k), in_factors(v), in_factors(b[..., : R * Hv // devices])

        given = (u, run), (before, past), taps
        *mixed, b = with_past(convolved, *given, on_each_device=True, ranks=(3, 4, 4, 4))
        q, k, v = (checkpoint_name(y, POINT) for y in mixed)
        own = u.reshape(B, T, devices, -1)[..., : sum(widths)].reshape(B, T, -1)
        tails = taken_apart(last_inputs(before, own, past, run, length), sizes[:3], devices)
        q, k = q.reshape(B, T, H, K), k.reshape(B, T, R, H, K)
        return q, k, v.reshape(B, T, R, Hv, -1), self._sizes(b), tails

    def joined_kernels(self) -> dict[str, jax.Array]:
        """The kernels of q, k, v and beta side by side, and the taps, as one product reads them."""
        if not self.use_short_conv:
            return {}
        maps, sizes = self._joined_maps()
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        taps = [conv.weight[...].astype(accumulator_dtype(self.dtype)) for conv in convs]
        return {"qkvb": joined_kernel(maps, sizes, self.dtype), "taps": by_devices(taps, sizes)}

    def _joined_maps(self) -> tuple[list[nnx.Linear], list[tuple[int, int]]]:
        """Those of q, k, v and beta; of each how many parts it has, and the columns of one."""
        maps, R = [self.q_proj, self.k_proj, self.v_proj, self.b_proj], self.num_householder
        return maps, [(n, m.out_features // n) for m, n in zip(maps, (1, R, R, R), strict=True)]

    def _choice(self, x: jax.Array) -> Choice:
        """What the convolutions of ``x`` run by, or what stands behind them without any."""
        (B, T, _), K = x.shape, self.head_dim
        op = functools.partial(self._op, x)
        of_queries, of_values = Form(self._activation("q"), K), Form(self._activation("v"))
        H, R, Hv, V = self.num_heads, self.num_householder, self.num_v_heads, self.value_dim
        convolutions = [Convolution(of_queries, C, K) for C in (H * K, R * H * K)]
        if self.use_short_conv:
            convolutions.append(Convolution(of_values, R * Hv * V, V))
        taps = self.conv_size if self.use_short_conv else None
        given = {"B": B, "T": T, "conv_size": taps, "dtype": self.dtype}
        return choose(self.conv_implementation, convolutions, op=op, **given)

    def _gives_raw(self, x: jax.Array, choice: Choice) -> bool:
        """Whether the op's kernel makes activations and lengths: `convolution.raw.takes_raw`."""
        return (
            not self.use_short_conv
            and self.qk_activation == "silu"
            and (choice.named, choice.on_cuda) == (None, "triton")
            and placement() is None
            and not any(explicit_names(x))
            and takes_raw(**self._lengths(x), dtype=self.dtype)
        )

    def _op(self, x: jax.Array, platform: str) -> str:
        """What the op of ``x`` runs in a gradient."""
        fixed = {"dtype": self.dtype, "chunk_size": self.chunk_size}
        return self.implementation or select_implementation(
            platform, **self._lengths(x), **fixed, differentiated=True
        )

    def _lengths(self, x: jax.Array) -> dict[str, int]:
        """The op's, by their letters."""
        sizes = {"B": x.shape[0], "T": x.shape[1], "R": self.num_householder, "H": self.num_heads}
        return sizes | {"K": self.head_dim, "Hv": self.num_v_heads, "V": self.value_dim}

    def runs_kernel(self, x: jax.Array) -> bool:
        """Whether a GPU runs the op of ``x`` by a kernel."""
        return self._op(x, "cuda") == "triton"

    def _output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        gate = self.g_proj(x) if self.use_output_gate else None
        is_whole = gate is None and o.shape[1] > 1 and placement() is None and rows.may_run(o)
        return self._project_out(o, gate, by_kernel=is_whole and self.runs_kernel(x))


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
        fixed={"use_forget_gate": gated} | ({} if gated else {"initial_gate": None}),
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
