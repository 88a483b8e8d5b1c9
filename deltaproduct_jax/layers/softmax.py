"""Softmax attention in the form that its sizes and the platform ask for.

- "plain": all scores at once, ``[B, H, T, S]``.
- "chunked": those of some queries after another, computed anew for gradients.
- "cudnn": cuDNN's kernels for NVIDIA GPUs, which keep no scores.

Logits and softmax are in float32 at least in every form. Which one runs is one rule,
`select_attention`; by platform it is applied when a program is lowered, as for the op. Over a mesh
that training is laid out on, every device runs it on whole rows of its own heads.

Shape suffixes: B batch, T queries, S keys, H heads, K key width, V value width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deltaproduct_jax.ops.checks import check_size
from deltaproduct_jax.ops.parts import (
    OwnHeads,
    explicit_axes,
    explicit_names,
    is_left_to_the_compiler,
    mesh_of,
    on_each_part,
    placed,
    placement,
)
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.selection import PLATFORMS

POINT = "attention_outputs"  # name of what `attend` returns, for policies of `jax.checkpoint`
# Scores that are held at once; half a gibibyte in float32.
MOST_SCORES = 2**27
# Queries at once at least, for products that are worth it. All devices of a sequence's axis have
# some, so that it should divide by their number.
LEAST_QUERIES = 128
# Lengths below it are no work for a kernel.
CUDNN_FROM = 128
# Of GPUs for which cuDNN has attention that keeps no scores, the least.
CUDNN_CAPABILITY = 8.0


class Places(NamedTuple):
    """Which keys a query sees: those of its run, not behind it, and within the window.

    Attributes:
        run: ``[B, T]``, number of the query's segment in its row.
        position: ``[B, T]``, place in that segment.
        run_of_keys: ``[B, S]``; a number that no query has is seen by none.
        position_of_keys: ``[B, S]``.
    """

    run: Int[Array, "B T"]
    position: Int[Array, "B T"]
    run_of_keys: Int[Array, "B S"]
    position_of_keys: Int[Array, "B S"]


_LAYOUTS = {
    "q": ("B", "T", "H", "K"), "k": ("B", "S", "H", "K"), "v": ("B", "S", "H", "V"),
    "run": ("B", "T"), "position": ("B", "T"),
    "run_of_keys": ("B", "S"), "position_of_keys": ("B", "S"),
}  # fmt: skip


def select_attention(
    platform: str,
    *,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    dtype: jax.typing.DTypeLike,
    S: int | None = None,
    whole: bool = True,
    window: int | None = None,
) -> str:
    """The form of softmax attention in a program that this process traces now.

    Sizes are those of all devices; over a mesh the answer is what each of them runs.

    Args:
        platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
        B: sequences.
        T: queries.
        H: heads.
        K: width of queries and keys.
        V: width of values.
        dtype: of q, k and v.
        S: keys; None: as many as queries.
        whole: whether every row is one segment with nothing before it.
        window: tokens that one sees, itself among them; None for all before it.

    Returns:
        "cudnn" on NVIDIA GPUs where JAX takes these sizes: float16 or bfloat16, V equal to K, a
        multiple of 8 up to 128, or 256 where this process has a Hopper GPU; for whole rows of
        `CUDNN_FROM` tokens or more, and in a process that has cuDNN. Else "chunked" where a device
        has more than `MOST_SCORES` scores, and "plain".

        On a mesh "cudnn" runs where training lays out rows over data and fsdp, heads over tensor
        and tokens over sequence, and these divide them; inside `jax.shard_map` over all axes; and
        on explicit axes, along which rows and heads may lie. It does not on any other mesh that is
        known while tracing, which the compiler cuts arrays for, nor for keys of a past (S unlike
        T).

    Raises:
        ValueError: the platform is not known, or a size is none.
    """
    if platform not in PLATFORMS:
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(f"platform={platform!r} is not known; it may be one of {names}")
    given = {"B": B, "T": T, "H": H, "K": K, "V": V, "S": T if S is None else S}
    B, T, H, K, V, S = (check_size(name, size, 0) for name, size in given.items())
    own = _own_heads(B, T, S, H)
    if own is not None:
        B, H = own.B, own.H
    sizes = (B, T, S, H)
    is_spread = placement() is not None or is_left_to_the_compiler(but_explicit=True)
    is_known = all(isinstance(size, int) for size in sizes)
    if (
        platform == "cuda"
        and is_known
        and whole
        and S == T >= CUDNN_FROM
        and V == K
        and (own is not None or not is_spread)
        and _is_taken_by_cudnn((B, T, H, K), jnp.dtype(dtype), window)
    ):
        return "cudnn"
    is_large = is_known and T > LEAST_QUERIES and math.prod(sizes) > MOST_SCORES
    return "chunked" if is_large else "plain"


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    places: Places,
    *,
    whole: bool = False,
    window: int | None = None,
) -> Float[Array, "B T H V"]:
    """Means of values, weighted by the softmax of ``q . k / sqrt(K)`` over the keys that are seen.

    Args:
        q: queries, finite as all else is.
        k: keys.
        v: values.
        places: which keys a query sees, at least one.
        whole: every row is one segment with nothing before it, as ``places`` says too.
        window: tokens that one sees, itself among them; None for all before it.

    Returns:
        In the dtype of ``v``.
    """
    return checkpoint_name(_attend(q, k, v, places, whole, window), POINT)


def _attend(q, k, v, places: Places, whole: bool, window: int | None):
    (B, T, H, K), (S, V) = q.shape, (k.shape[1], v.shape[-1])
    own = _own_heads(B, T, S, H)
    if own is not None:

        def on_device(tokens, places):
            places = _places_of_whole_rows(own.B, T) if whole else places
            with placed(None):
                return _attend(*tokens, places, whole, window)

        # What a device knows by itself it is not sent.
        return own.run(on_device, (q, k, v), None if whole else places)
    sizes = {"B": B, "T": T, "S": S, "H": H, "K": K, "V": V, "dtype": q.dtype, "window": window}
    select = functools.partial(select_attention, **sizes)
    anywhere = functools.partial(_anywhere, form=select("cpu"), window=window)
    is_fused = select("cuda", whole=whole) == "cudnn"
    if any(explicit_names(q)) or explicit_axes(mesh_of(q)):
        _, along_T, _, along_K = explicit_names(q, least=2)
        if select("cpu") == "plain" and (along_T or along_K or not is_fused):
            return anywhere(q, k, v, places)
        arrays = {"q": q, "k": k, "v": v, **places._asdict()}

        def on_part(x):
            places = Places(*(x[name] for name in Places._fields))
            return _attend(x["q"], x["k"], x["v"], places, whole, window)

        return on_each_part(on_part, arrays, _LAYOUTS, ("B", "T", "H", "V"), all_axes=True)
    if is_fused:
        return _by_platform(anywhere, window, q, k, v, places)
    return anywhere(q, k, v, places)


def _places_of_whole_rows(B: int, T: int) -> Places:
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    run = jnp.zeros_like(position)
    return Places(run, position, run, position)


def _anywhere(q, k, v, places, *, form, window):
    if form == "plain":
        return _plain(q, k, v, places, window=window)
    return _rerun(functools.partial(_chunked, window=window))(q, k, v, places)


def _rerun(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, of which nothing is kept.

    A scan over blocks would keep what follows of places alone: masks as large as all scores.
    """
    return jax.checkpoint(run)


def _plain(q, k, v, places: Places, *, window: int | None):
    matmul = Matmul.of(v.dtype, None)
    scores_BHTS = matmul("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    distance_BTS = places.position[:, :, None] - places.position_of_keys[:, None]
    seen_BTS = (places.run[:, :, None] == places.run_of_keys[:, None]) & (distance_BTS >= 0)
    seen_BTS = seen_BTS if window is None else seen_BTS & (distance_BTS < window)
    # Not -inf, at which `jax.debug_infs` would stop: a token sees itself at least.
    unseen = jnp.finfo(scores_BHTS.dtype).min
    weights_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, unseen), axis=-1)
    return matmul("bhts,bshv->bthv", weights_BHTS, v).astype(v.dtype)


def _chunked(q, k, v, places: Places, *, window: int | None):
    """Some queries after another, every so many-th of a row: of a row that is cut all devices work.

    What a gradient sums up over them it sums in float32.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    at_once = max(LEAST_QUERIES, MOST_SCORES // (B * H * S))
    parts = -(-T // 2 ** int(math.log2(at_once)))  # a power of 2 suits any device's products
    dtype, wide = v.dtype, accumulator_dtype(v.dtype)
    wide_k, wide_v = k.astype(wide), v.astype(wide)

    def in_parts(x):
        x = jnp.pad(x, [(0, -T % parts if axis == 1 else 0) for axis in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, parts, *x.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def part(of_queries):
        q, run, position = of_queries
        seen = places._replace(run=run, position=position)
        return _plain(q, wide_k.astype(dtype), wide_v.astype(dtype), seen, window=window)

    o = jax.lax.map(part, jax.tree.map(in_parts, (q, places.run, places.position)))
    o = jnp.moveaxis(o, 0, 2)
    return o.reshape(B, -1, *o.shape[3:])[:, :T]


def _cudnn(q, k, v, *, window: int | None):
    is_cut = window is not None and window < q.shape[1]
    return jax.nn.dot_product_attention(
        q, k, v,
        scale=q.shape[-1] ** -0.5,
        is_causal=True,
        local_window_size=(window - 1, 0) if is_cut else None,
        implementation="cudnn",
    )  # fmt: skip


def _own_heads(B: int, T: int, S: int, H: int) -> OwnHeads | None:
    """What a device of a mesh has of queries and keys, if it may have whole rows."""
    spread = placement()
    return spread.own_heads(B, T, H) if spread is not None and S == T else None


@functools.cache
def _is_taken_by_cudnn(shape: tuple[int, ...], dtype: jnp.dtype, window: int | None) -> bool:
    """Whether JAX, and what it finds of cuDNN and GPUs, lets q, k and v of this shape pass."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype)] * 4
    try:
        for device in jax.local_devices():
            # Of other vendors' GPUs it is no number.
            if device.platform == "gpu" and float(device.compute_capability) < CUDNN_CAPABILITY:
                return False
        jax.eval_shape(_pullback(functools.partial(_cudnn, window=window)), *arrays)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


# JAX's kernels have a derivative of their own, and a switch by platform that is itself
# differentiated would keep what every branch keeps. So here queries, keys and values are kept, and
# the backward pass runs the forward one again; where a block is computed anew the two are one.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_platform(anywhere: Callable[..., jax.Array], window: int | None, q, k, v, places):
    return _choose(anywhere, window, _value, (q, k, v), places)


def _forward_rule(anywhere, window, q, k, v, places):
    return _by_platform(anywhere, window, q, k, v, places), (q, k, v, places)


def _backward_rule(anywhere, window, kept, do):
    *qkv, places = kept
    gradients = _choose(anywhere, window, _pullback, (*qkv, do), places)
    return *gradients, None


_by_platform.defvjp(_forward_rule, _backward_rule)


def _choose(anywhere, window, direction, arrays, places):
    """``direction`` of the platform's form, on ``arrays``."""

    def fused(*arrays):
        return _rows_of_all(direction(functools.partial(_cudnn, window=window)))(*arrays[:-1])

    @_rerun
    def others(*arrays):
        run = functools.partial(anywhere, places=arrays[-1])
        return direction(run)(*arrays[:-1])

    return jax.lax.platform_dependent(*arrays, places, cuda=fused, default=others)


def _value(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The forward pass as that of a gradient, so that it may be one with that of `_pullback`."""
    return lambda q, k, v: jax.vjp(run, q, k, v)[0]


def _pullback(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(run, q, k, v)[1](do)


def _rows_of_all(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` of arrays ``[B, ...]``, whose rows share nothing: mapped, they have more rows."""
    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def _fold(size, is_mapped, *arrays):
        whole = [
            x if has_axis else jnp.broadcast_to(x[None], (size, *x.shape))
            for x, has_axis in zip(arrays, is_mapped, strict=True)
        ]
        results = mapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return mapped
