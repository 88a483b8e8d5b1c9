"""The op over a mesh: batch and heads, which share nothing, and the sequence, which shares states.

Over its piece of a row every device knows an affine map of the state, S -> P S + F with P [K, K]
and F [K, V]. The op itself computes it: run from the state ``[0 | I]`` on values ``[v | 0]`` of
width V + K, it ends in ``[F | P]``, and what it reads out is ``[o_local | e]``, where the rows of
``e`` are scale q_t^T P_t for the product P_t of the factors up to token t. A scan of logarithmic
depth over the devices composes the maps, and ``o = o_local + e S`` adds what tokens read from the
state S that enters the piece.

The other way is a second run of the op from the true S. One run of width V + K costs less than one
of V + K and one of V, both forward and backward, as all that depends on keys alone (the products of
keys, the triangular inverse) is computed once. It is as exact: P is a product of factors of norm at
most 1 for unit keys and beta in [0, 2], built as the op builds any state.

F and P are sent apart, so that nothing is larger than a state if K is at most V, whatever T is; and
the backward pass, JAX's own transposition of this, sends its cotangents the same way back.

Shape suffixes: B batch, T tokens, Hv value heads, K key width, V value width, W = V + K.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Integer

from deltaproduct_jax.ops import checks, kernels
from deltaproduct_jax.ops.api import delta_product
from deltaproduct_jax.ops.checks import known_finite
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.debug import check_op_values
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.packing import starts_of_segments
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.ops.varying import mark_all_varying

Axis = str | tuple[str, ...] | None

# Which of its dimensions an argument or a result shares with the mesh; the others are whole.
_ROLES = {"B": "batch", "T": "sequence", "H": "head", "Hv": "head"}


def sharded_delta_product(
    q: Float[Array | np.ndarray, "B T H K"],
    k: Float[Array | np.ndarray, "B T R H K"],
    v: Float[Array | np.ndarray, "B T R Hv V"],
    beta: Float[Array | np.ndarray, "B T R Hv"],
    g: Float[Array | np.ndarray, "B T Hv"] | None = None,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axis: Axis = None,
    head_axis: Axis = None,
    sequence_axis: Axis = None,
    scale: float | None = None,
    initial_state: Float[Array | np.ndarray, "B Hv K V"] | None = None,
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """`delta_product` with its arguments, whole ones, spread over the devices of a mesh.

    The result is that of one device to rounding; in bfloat16, outputs behind the first piece of a
    row are rounded once more, states are not. Every array argument has its gradient. Over n devices
    of ``sequence_axis`` the forward pass sends ceil(log2 n) + 1 arrays [B, Hv, K, V] and one fewer
    than ceil(log2 n) of [B, Hv, K, K], with one device's B and Hv, in float32 (float64 when q is),
    and the sum that gives everybody ``final_state``.

    Args:
      q, k, v, beta, g, scale, initial_state, segment_ids, use_qk_l2norm: as in `delta_product`,
        with their whole shapes. Segments may begin anywhere, at the edge of a device too.
        ``initial_state`` continues the first segment of each whole row, ``final_state`` belongs to
        its last.
      mesh: the devices; its axes that are not named below hold copies.
      batch_axis: axis of the mesh over which B is cut, or several, or None for uncut.
      head_axis: the same for H and Hv together; a key head stays with its value heads.
      sequence_axis: the same for T; with several, the first varies slowest along the row.
      chunk_size: tokens in a chunk within one device's piece.
      implementation: as in `delta_product`; None chooses by platform, the length of a piece, and a
        value width of V + K.
      precision: as in `delta_product`.

    Returns:
      ``(o, final_state)`` as `delta_product` returns them: o [B, T, Hv, V] is cut as v is,
      final_state [B, Hv, K, V] over batch and heads, the same on all of the sequence axis.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, an axis is not one of the mesh's
        or is named twice, or a dimension does not divide by the devices of its axis.

    Example:
      >>> import jax
      >>> from deltaproduct_jax.ops import sharded_delta_product
      >>> mesh = jax.make_mesh((1, 1), ("data", "sequence"))
      >>> q, k, v, b = (jax.random.normal(jax.random.key(i), (1, 8, 2, 4, 16)) for i in range(4))
      >>> o, state = sharded_delta_product(
      ...     q[:, :, 0], k, v, jax.nn.sigmoid(b[..., 0]), use_qk_l2norm=True,
      ...     mesh=mesh, batch_axis="data", sequence_axis="sequence",
      ... )
      >>> o.shape, state.shape
      ((1, 8, 4, 16), (1, 4, 16, 16))

    References:
      Blelloch. Prefix sums and their applications. 1990: scans over affine maps.
      Yang, Wang, Zhang, Shen, Kim. Parallelizing Linear Transformers with the Delta Rule over
      Sequence Length. 2024. https://arxiv.org/abs/2406.06484
    """
    given = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    given |= {"initial_state": initial_state, "segment_ids": segment_ids}
    arrays = {name: x for name, x in checks.as_arrays(**given).items() if x is not None}
    checks.check_inputs(arrays)
    checks.check_implementation(implementation, AVAILABLE)
    chunk_size = checks.check_chunk_size(chunk_size, implementation)
    checks.check_flag("use_qk_l2norm", use_qk_l2norm)
    axes = _check_axes(mesh, batch=batch_axis, head=head_axis, sequence=sequence_axis)
    _check_divisible(mesh, axes, arrays["k"].shape)
    check_op_values(arrays["k"], arrays["beta"], arrays.get("g"), use_qk_l2norm=use_qk_l2norm)
    options = {
        "scale": checks.check_scale(scale, arrays["q"].shape[-1]),
        "use_qk_l2norm": use_qk_l2norm,
        "chunk_size": chunk_size,
        "implementation": implementation,
        "precision": checks.check_precision(precision),
    }
    return _over_mesh(arrays, mesh, tuple(axes.items()), tuple(options.items()))


@functools.partial(jax.jit, static_argnames=("mesh", "axes", "options"))
def _over_mesh(arrays, mesh, axes, options):
    """The checked arguments through shard_map; jitted, so that a second call finds the program."""
    axes, options = dict(axes), dict(options)

    def spec(layout):
        return PartitionSpec(*(axes.get(_ROLES.get(dimension)) or None for dimension in layout))

    in_specs = {name: spec(checks.LAYOUT[name]) for name in arrays}
    arrays = {name: _along_explicit_axes(x, mesh, in_specs[name]) for name, x in arrays.items()}
    return jax.shard_map(
        lambda arrays: delta_product_of_piece(
            **arrays, axis_name=axes["sequence"] or None, **options
        ),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=(spec(("B", "T", "Hv", "V")), spec(checks.LAYOUT["initial_state"])),
        check_vma=not kernels.is_interpreted(
            options["implementation"], None if isinstance(mesh, AbstractMesh) else mesh
        ),
    )(arrays)


def delta_product_of_piece(
    q, k, v, beta, g=None, *, axis_name, initial_state=None, segment_ids=None, precision, **options
):
    """`delta_product` inside `shard_map`, where every device of an axis holds a piece of each row.

    Args:
      q, k, v, beta, g, segment_ids: this device's tokens, shapes as in `delta_product`.
      axis_name: the axis, or several; None: the rows are whole, and the op runs as it is.
      initial_state: of the whole row, the same on all of the axis.
      precision, **options: of `delta_product`.

    Returns:
      ``(o, final_state)``: o of this piece; final_state of the whole row, on every device.
    """
    options = {"precision": precision, **options}
    state = {"initial_state": initial_state, "segment_ids": segment_ids}
    if axis_name is None:
        return delta_product(q, k, v, beta, g, **state, **options)
    (B, T, _, K), (Hv, V) = q.shape, v.shape[-2:]
    wide, index = accumulator_dtype(q.dtype), jax.lax.axis_index(axis_name)
    if T == 0:
        segment_ids = None
    resets = None
    if segment_ids is not None:
        # Whatever the first device compares with does not matter: it has nothing before it.
        last_ids = _from_before(segment_ids[:, -1], axis_name, 1)
        starts_B1 = ((last_ids != segment_ids[:, 0]) & (index > 0))[:, None]
        resets = jnp.concatenate([starts_B1, starts_of_segments(segment_ids)[:, 1:]], axis=1)
    check_state = initial_state is not None
    if not check_state:
        initial_state = jnp.zeros((B, Hv, K, V), wide)
    tokens = Tokens(q, k, v, beta, forgets(g), None)
    tokens, initial_state, resets = mark_all_varying((tokens, initial_state, resets))

    def run(tokens, state):
        return _piece(only_finite(tokens), state, segment_ids, resets, axis_name, options)

    o_BTHvV, final_state = contained(
        run,
        tokens,
        initial_state,
        resets,
        head_axes=Tokens(q=2, k=3, v=3, beta=3, g=None if g is None else 2, resets=None),
        check_state=check_state,
        axis_name=axis_name,
    )
    return o_BTHvV, jax.lax.psum(final_state, axis_name)


def _piece(tokens: Tokens, initial_state, segment_ids, resets, axis_name, options):
    """Outputs of finite tokens; on the last device the final state, elsewhere zeros."""
    q, k, v, beta, g, _ = tokens
    (B, _, _, K), (Hv, V) = q.shape, v.shape[-2:]
    wide, precision = accumulator_dtype(q.dtype), options["precision"]
    index, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    identity_BHvKK = jnp.broadcast_to(jnp.eye(K, dtype=wide), (B, Hv, K, K))
    if resets is not None:
        # A segment that starts with the piece, which the op cannot see, makes P zero.
        identity_BHvKK = jnp.where(resets[:, 0, None, None, None], 0, identity_BHvKK)
    start_BHvKV = jnp.where(index == 0, initial_state, 0)
    wide_v = jnp.pad(v, ((0, 0),) * 4 + ((0, K),))
    with known_finite():
        read_BTHvW, end_BHvKW = delta_product(
            q,
            k,
            wide_v,
            beta,
            g,
            initial_state=jnp.concatenate([start_BHvKV, identity_BHvKK], axis=-1),
            segment_ids=segment_ids,
            **options,
        )
    after_BHvKV = _compose(end_BHvKW, V, axis_name, Matmul.wide(q.dtype, precision))
    before_BHvKV = _from_before(after_BHvKV, axis_name, 1)
    matmul = Matmul.of(q.dtype, precision)
    # XLA for CPUs (jaxlib 0.10.2) multiplies bfloat16 only where the axes of a batch come first.
    read_BHvTK = jnp.swapaxes(read_BTHvW[..., V:], 1, 2)
    o_BTHvV = jnp.swapaxes(matmul("bhtk,bhkv->bhtv", read_BHvTK, before_BHvKV), 1, 2)
    o_BTHvV += read_BTHvW[..., :V].astype(wide)
    return o_BTHvV.astype(v.dtype), jnp.where(index == size - 1, after_BHvKV, 0)


def _compose(end_BHvKW, V: int, axis_name, matmul: Matmul):
    """The state after each device's piece, from all devices' maps ``[F | P]``.

    After the round that looks s devices back, a device knows the map of the 2 s pieces up to its
    own. Whoever has no device so far back receives zeros, the map of a row before it begins, and
    already knows its state.
    """
    size, shift = jax.lax.axis_size(axis_name), 1
    state_BHvKV, map_BHvKK = end_BHvKW[..., :V], end_BHvKW[..., V:]
    while shift < size:
        earlier_BHvKV = _from_before(state_BHvKV, axis_name, shift)
        state_BHvKV += matmul("bhkl,bhlv->bhkv", map_BHvKK, earlier_BHvKV)
        if 2 * shift < size:  # the last round needs no map, only states
            earlier_BHvKK = _from_before(map_BHvKK, axis_name, shift)
            map_BHvKK = matmul("bhkl,bhlm->bhkm", map_BHvKK, earlier_BHvKK)
        shift *= 2
    return state_BHvKV


def _from_before(x: jax.Array, axis_name, shift: int) -> jax.Array:
    """``x`` of the device ``shift`` places earlier on the axis; zeros where there is none."""
    pairs = [(i, i + shift) for i in range(jax.lax.axis_size(axis_name) - shift)]
    return jax.lax.ppermute(x, axis_name, pairs)


def _along_explicit_axes(x: jax.Array, mesh, spec: PartitionSpec) -> jax.Array:
    """``x`` laid out as ``spec`` says over explicit axes, along which shard_map moves nothing."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [n for n, kind in types.items() if kind == jax.sharding.AxisType.Explicit]
    if not explicit:
        return x
    spec = [(names,) if isinstance(names, str) else names or () for names in spec]
    kept = (tuple(n for n in names if n in explicit) or None for names in spec)
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, PartitionSpec(*kept)))


def _size(mesh, axis: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[name] for name in axis], dtype=int))


def _check_axes(mesh, **axes: Axis) -> dict[str, tuple[str, ...]]:
    """The axes as tuples, empty for None; ValueError unless all are the mesh's, each once."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {type(mesh).__name__}; "
            'jax.make_mesh((2, 4), ("data", "sequence")) makes one'
        )
    named, role_of = {}, {}
    for role, axis in axes.items():
        if not isinstance(axis, str | tuple | list | None):
            raise ValueError(
                f"{role}_axis={axis!r} must be the name of an axis of the mesh, a tuple of them or "
                "None"
            )
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        for name in names:
            if name not in mesh.axis_names:
                has = ", ".join(repr(n) for n in mesh.axis_names)
                raise ValueError(
                    f"{role}_axis={axis!r} is not an axis of the mesh, which has {has}"
                )
            if name in role_of:
                raise ValueError(
                    f"{role}_axis={axis!r} is taken: {role_of[name]}_axis names {name!r} already; "
                    "one axis of the mesh cuts one dimension"
                )
            role_of[name] = role
        # Over an axis of one device nothing is cut, and no map is needed.
        named[role] = tuple(name for name in names if mesh.shape[name] > 1)
    return named


def _check_divisible(mesh, axes: dict[str, tuple[str, ...]], shape_of_k: tuple[int, ...]) -> None:
    """ValueError unless B, T and H divide by the devices of their axes."""
    B, T, _, H, _ = shape_of_k
    remedies = {
        "batch": (B, "B", "a larger batch"),
        "head": (H, "H", "fewer devices on that axis"),
        "sequence": (T, "T", "padding the rows at their end (beta = 0 and g = 0 change no state)"),
    }
    for role, (length, letter, remedy) in remedies.items():
        devices = _size(mesh, axes[role])
        if length % devices:
            raise ValueError(
                f"{letter}={length} must be a multiple of the {devices} devices of "
                f"{role}_axis={'/'.join(axes[role])!r}; {remedy} would do"
            )
