"""The public functions: check once, choose an implementation, call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from deltaproduct_jax.ops import checks, kernels
from deltaproduct_jax.ops.convolution.raw import l2_normalise, silu
from deltaproduct_jax.ops.debug import check_op_values
from deltaproduct_jax.ops.dispatch import dispatch, step
from deltaproduct_jax.ops.packing import by_segment, starts_of_segments
from deltaproduct_jax.ops.parts import on_each_part, placed, placement
from deltaproduct_jax.ops.precision import L2NORM_EPSILON as L2NORM_EPSILON
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.reverse_only import NO_FORWARD_MODE
from deltaproduct_jax.ops.selection import AVAILABLE


def delta_product(
    q: Float[Array | np.ndarray, "B T H K"],
    k: Float[Array | np.ndarray, "B T R H K"],
    v: Float[Array | np.ndarray, "B T R Hv V"],
    beta: Float[Array | np.ndarray, "B T R Hv"],
    g: Float[Array | np.ndarray, "B T Hv"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array | np.ndarray, "B *S Hv K V"] | None = None,
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    num_segments: int | None = None,
    use_qk_l2norm: bool = False,
    use_silu: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B *S Hv K V"]]:
    """(Gated) DeltaProduct over a sequence.

    With the state S [K, V] of one value head, for every token t::

        S <- exp(g_t) S
        S <- S + beta_tr k_tr (v_tr - S^T k_tr)^T      for r = 1..R
        o_t = scale S^T q_t

    Args:
      q: queries [B, T, H, K]; bfloat16, float16, float32 or float64, as k and v.
      k: R keys per token [B, T, R, H, K]; unit vectors, or see ``use_qk_l2norm``.
      v: R values per token [B, T, R, Hv, V]; Hv is a multiple of H, and each key head serves a
        group of Hv / H consecutive value heads.
      beta: step sizes [B, T, R, Hv] in (0, 1), or (0, 2) for negative eigenvalues; dtype of q, or
        float32.
      g: log decay [B, T, Hv], at most 0, once per token; dtype of q, or float32. None: no decay.
      scale: multiplies q; K**-0.5 by default. It does not enter the state.
      initial_state: state before the first token [B, Hv, K, V], float32 (float64 when q is); zero
        by default.
      segment_ids: integers [B, T]: several sequences in one row. The state starts anew where the
        id changes, and an id that returns is a new segment. ``initial_state`` continues the first
        segment of the row; ``final_state`` belongs to its last.
      num_segments: S, segments that a row has at most: states are then by segment, [B, S, Hv, K,
        V]. ``initial_state`` is that before each, and instead of ``final_state`` comes the one
        after each; a segment that is not there keeps its own, and outputs of those beyond the
        S-th are NaN. Every implementation can; rows are read in pieces of 64 tokens at most.
      use_qk_l2norm: replace q and k by x / sqrt(sum(x**2) + 1e-6), computed in float32; the
        result is rounded to the dtype of q, unless ``precision`` is "high" or "highest".
      use_silu: replace q, k and v by x sigmoid(x) first, computed in float32; with
        ``use_qk_l2norm`` q and k are rounded once, behind both. Kernels of many narrow heads on a
        GPU then read what came in (`takes_raw` tells which).
      chunk_size: tokens in a chunk of the chunked implementation; it changes speed and memory, not
        the result.
      implementation: "chunked" (matmuls within chunks, own backward pass), "recurrent" (a scan over
        tokens), "associative" (a log-depth scan), "triton" (kernels for GPU), "pallas_tpu" (a
        kernel for TPU; on a CPU it is interpreted, slowly), or None for a choice by platform and
        shape, made when the program is lowered. `select_implementation` tells which, and
        IMPLEMENTATIONS.md beside this file has the rule. Forward-mode differentiation (jvp) needs
        "recurrent" or "associative".
      precision: "default", "high" or "highest". None: float32 products for float32 inputs (three
        TF32 products in the GPU kernels, where "highest" makes them exact); bfloat16 operands with
        float32 accumulation for bfloat16 inputs, float32 ones on a CPU;
        float32 for float16 inputs, except in the GPU kernels. With bfloat16 inputs, beta = 2 and
        equal keys the errors of outputs are up to 1.5 times those of a recurrence with bfloat16
        products (5e-2 over 2048 tokens), of gradients up to 2.3 times; "highest" avoids that.
        PRECISION.md beside this file has all of it.

    Returns:
      ``(o, final_state)``: outputs [B, T, Hv, V] in the dtype of v, and the state after the last
      token [B, Hv, K, V] in float32 (float64 when q is float64).

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or the named kernel cannot run
        these.
      TypeError: forward-mode differentiation of an implementation with its own backward pass.

    Example:
      >>> import jax
      >>> from deltaproduct_jax.ops import delta_product
      >>> q, k, v, b = (jax.random.normal(jax.random.key(i), (1, 8, 2, 4, 16)) for i in range(4))
      >>> o, state = delta_product(
      ...     q[:, :, 0], k, v, 2 * jax.nn.sigmoid(b[..., 0]), use_qk_l2norm=True
      ... )
      >>> o.shape, state.shape
      ((1, 8, 4, 16), (1, 4, 16, 16))

    References:
      Siems, Carstensen, Zela, Hutter, Pontil, Grazzi. DeltaProduct: Improving State-Tracking in
      Linear RNNs via Householder Products. 2025. https://arxiv.org/abs/2502.10297
    """
    options = {
        "scale": scale,
        "use_qk_l2norm": use_qk_l2norm,
        "use_silu": use_silu,
        "chunk_size": chunk_size,
        "implementation": implementation,
        "precision": precision,
    }
    if num_segments is not None:
        return _by_segment((q, k, v, beta, g), initial_state, segment_ids, num_segments, options)
    carried = {"initial_state": initial_state, "segment_ids": segment_ids}
    spread = placement()
    checks.check_flag("use_silu", options["use_silu"])
    if spread is not None:
        if options.pop("use_silu"):
            q, k, v = map(silu, (q, k, v))
        with placed(None):  # what runs on each device is the op as it is
            return spread.op(q, k, v, beta, g, **carried, **options)
    return _whole({"q": q, "k": k, "v": v, "beta": beta, "g": g, **carried}, options)


def _whole(arguments, options):
    """`delta_product` where no mesh is placed, with one state a row."""
    implementation, use_qk_l2norm = options["implementation"], options["use_qk_l2norm"]
    checks.check_implementation(implementation, AVAILABLE)
    chunk_size = checks.check_chunk_size(options["chunk_size"], implementation)
    precision = checks.check_precision(options["precision"])
    checks.check_flag("use_qk_l2norm", use_qk_l2norm)
    arrays = checks.as_arrays(**arguments)
    checks.check_inputs(arrays)
    values = (arrays[name] for name in ("k", "beta", "g"))
    check_op_values(*values, use_qk_l2norm=use_qk_l2norm)
    scale = checks.check_scale(options["scale"], arrays["q"].shape[-1])
    fixed = {"scale": scale, "precision": precision, "chunk_size": chunk_size}
    return on_each_part(
        functools.partial(_run, **options | fixed),
        arrays,
        checks.LAYOUT,
        (checks.LAYOUT["o"], checks.LAYOUT["state"]),
        check_vma=not kernels.is_interpreted(implementation),
    )


def _by_segment(tokens, initial_states, segment_ids, num_segments, options):
    """`delta_product` with a state before and after every segment."""
    num_segments = checks.check_segments(num_segments, segment_ids)
    if placement() is not None:
        raise ValueError(
            f"num_segments={num_segments} cannot run over a mesh; leave it None there, or give a "
            "row to every segment"
        )
    names = ("q", "k", "v", "beta", "g")
    arrays = checks.as_arrays(**dict(zip(names, tokens, strict=True)), segment_ids=segment_ids)
    sizes, dtype = checks.check_inputs(arrays), arrays["q"].dtype
    states = checks.as_arrays(initial_state=initial_states)["initial_state"]
    shape = checks.check_states(states, num_segments, sizes, dtype)
    states = jnp.zeros(shape, accumulator_dtype(dtype)) if states is None else states

    def run(tokens, state, _):
        # Of tokens that do not count beta and g are 0 as well.
        return delta_product(*tokens, initial_state=state, **options)

    return by_segment(run, tuple(arrays[n] for n in names), states, arrays["segment_ids"])


def _run(arrays, *, use_qk_l2norm, use_silu, **options):
    """`delta_product` on checked arguments, on one device or on a device's part of them."""
    q, k, v, beta, g, initial_state, segment_ids = arrays.values()
    # Rounded to bfloat16 again, unit vectors are no longer of length 1.
    rounded = options["precision"] in (None, "default")
    options["raw"] = use_silu and use_qk_l2norm and rounded
    if not options["raw"]:
        q, k, v = map(silu, (q, k, v)) if use_silu else (q, k, v)
        q, k = (l2_normalise(x, rounded) for x in (q, k)) if use_qk_l2norm else (q, k)
    check_state = initial_state is not None
    if initial_state is None:
        B, _, _, K = q.shape
        initial_state = jnp.zeros((B, *v.shape[-2:-1], K, v.shape[-1]), accumulator_dtype(q.dtype))
    resets = None if segment_ids is None else starts_of_segments(segment_ids)
    options |= {"check_state": check_state, "known_finite": checks.is_known_finite()}
    try:
        return dispatch(q, k, v, beta, g, initial_state, resets, **options)
    except TypeError as error:
        # jacfwd maps tangents, which `reverse_only` cannot tell from a mapped gradient; JAX can.
        if "forward-mode" not in str(error) or str(error) == NO_FORWARD_MODE:
            raise
        raise TypeError(NO_FORWARD_MODE) from error


def delta_product_step(
    state: Float[Array | np.ndarray, "B Hv K V"],
    q: Float[Array | np.ndarray, "B H K"],
    k: Float[Array | np.ndarray, "B R H K"],
    v: Float[Array | np.ndarray, "B R Hv V"],
    beta: Float[Array | np.ndarray, "B R Hv"],
    g: Float[Array | np.ndarray, "B Hv"] | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """One token of `delta_product`: the arguments without their axis T, the state first.

    On a GPU the state is updated in place inside a loop or a `jax.jit` that donates it; otherwise
    it is copied first, which takes about as long as the step.

    Args:
      state: [B, Hv, K, V], float32 (float64 when q is).
      q: query [B, H, K].
      k: keys [B, R, H, K].
      v: values [B, R, Hv, V].
      beta: step sizes [B, R, Hv].
      g: log decay [B, Hv] or None.
      scale: multiplies q; K**-0.5 by default.
      use_qk_l2norm: as in `delta_product`.

    Returns:
      ``(o, state)``: [B, Hv, V] in the dtype of v, and the new state in the dtype of the old.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    checks.check_flag("use_qk_l2norm", use_qk_l2norm)
    arrays = checks.as_arrays(q=q, k=k, v=v, beta=beta, g=g, state=state)
    checks.check_inputs(arrays, one_token=True)
    values = (arrays[name] for name in ("k", "beta", "g"))
    check_op_values(*values, use_qk_l2norm=use_qk_l2norm)
    layouts = {name: tuple(d for d in checks.LAYOUT[name] if d != "T") for name in arrays}

    def run(arrays):
        q, k, v, beta, g, state = arrays.values()
        if use_qk_l2norm:
            q, k = l2_normalise(q), l2_normalise(k)
        return step(state, q, k, v, beta, g, scale=checks.check_scale(scale, q.shape[-1]))

    return on_each_part(run, arrays, layouts, (("B", "Hv", "V"), layouts["state"]))
