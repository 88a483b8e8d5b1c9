"""Softmax attention in each of its forms: the rule, values and gradients, and what is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltaproduct_jax.layers import SoftmaxAttention, softmax
from deltaproduct_jax.layers.softmax import Places, attend, select_attention

B, T, S, H, K, V = 2, 21, 26, 2, 8, 8
SIZES = {"B": 8, "T": 4096, "H": 4, "K": 128, "V": 128, "dtype": "bfloat16"}
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture
def small(monkeypatch):
    """Chunks of few queries."""
    monkeypatch.setattr(softmax, "MOST_SCORES", 1)
    monkeypatch.setattr(softmax, "LEAST_QUERIES", 4)


def places_of(rows, length):
    """Those of whole rows."""
    position = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Places(np.zeros_like(position), position, np.zeros_like(position), position)


def packed():
    """Three segments in row 0, one in row 1, the first going on from keys of the past."""
    run = np.array([[0] * 6 + [1] * 9 + [2] * 6, [0] * T])
    held = np.array([3, 5])  # of five places
    position = np.concatenate([[np.r_[3:9, 0:9, 0:6]], [np.arange(5, 5 + T)]])
    old = np.broadcast_to(np.arange(S - T), (B, S - T))
    run_of_old = np.where(old < held[:, None], 0, -1)
    of_keys = np.concatenate([run_of_old, run], axis=1), np.concatenate([old, position], axis=1)
    return Places(*(x.astype(np.int32) for x in (run, position, *of_keys)))


def drawn(seed, rows=B, queries=T, keys=S, width=K):
    rng = np.random.default_rng(seed)
    shapes = [(rows, n, H, width) for n in (queries, keys, keys, queries)]
    return [rng.normal(size=shape) for shape in shapes]


def reference(q, k, v, do, places, window=None):
    """Outputs and gradients, one query after another, in float64."""
    o, dq, dk, dv = (np.zeros_like(x) for x in (do, q, k, v))
    for b, t, h in np.ndindex(q.shape[:3]):
        distance = places.position[b, t] - places.position_of_keys[b]
        seen = (places.run_of_keys[b] == places.run[b, t]) & (distance >= 0)
        seen = np.flatnonzero(seen if window is None else seen & (distance < window))
        scores = k[b, seen, h] @ q[b, t, h] * K**-0.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        o[b, t, h] = weights @ v[b, seen, h]
        dweights = v[b, seen, h] @ do[b, t, h]
        dscores = weights * (dweights - weights @ dweights) * K**-0.5
        dq[b, t, h] = dscores @ k[b, seen, h]
        dk[b, seen, h] += dscores[:, None] * q[b, t, h]
        dv[b, seen, h] += weights[:, None] * do[b, t, h]
    return o, dq, dk, dv


def both(run, q, k, v, do):
    o, pull = jax.vjp(run, q, k, v)
    return o, *pull(do)


def close(got, want, most):
    errors = [relative_error(x, y) for x, y in zip(got, want, strict=True)]
    assert max(errors) <= most, errors


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_each_form_is_the_softmax(form, window, request):
    """Packed rows with a past; the chunks do not divide the row."""
    if form == "chunked":
        request.getfixturevalue("small")
    assert select_attention("tpu", B=B, T=T, S=S, H=H, K=K, V=V, dtype="float32") == form
    arrays, places = drawn(0), packed()
    want = reference(*arrays, places, window)
    with jax.enable_x64(True):
        run = jax.jit(lambda *x: both(lambda *x: attend(*x, places, window=window), *x))
        close(run(*map(jnp.asarray, arrays)), want, 1e-12)


def test_chunks_add_up_gradients_in_float32(small):
    """Of 64 chunks, whose parts of a sum in bfloat16 would be too small to count in the end."""
    q, k, v, do = drawn(1, 1, 256, 256)
    arrays, places = (q / 10, k, v, np.ones_like(do)), places_of(1, 256)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    want = reference(*(np.asarray(x, np.float64) for x in narrow), places)
    got = jax.jit(lambda *x: both(lambda *x: attend(*x, places), *x))(*narrow)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    close(got, want, 1e-2)


def test_chunks_keep_no_scores(monkeypatch):
    """Not in a gradient either, and not as masks that a scan over blocks keeps."""
    monkeypatch.setattr(softmax, "MOST_SCORES", 2**16)
    length = 4096
    places = places_of(1, length)

    def loss(x):
        def block(x, scale):
            return attend(x * scale, x, x, places), None

        return jnp.sum(jax.lax.scan(block, x, jnp.ones(3))[0])

    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2


def test_chunks_over_explicit_axes(small):
    arrays, places = drawn(2), packed()
    run = jax.jit(lambda places, *x: both(lambda *x: attend(*x, places), *x))
    want = run(places, *(jnp.asarray(x, jnp.float32) for x in arrays))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    got = run(places, *(jax.device_put(np.float32(x), rows) for x in arrays))
    assert got[0].sharding.spec[0] == "data"
    close(got, want, 1e-6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "cudnn"),
        ({"window": 100, "K": 64, "V": 64, "dtype": "float16"}, "cudnn"),
        ({"dtype": "float32"}, "chunked"),
        ({"K": 100, "V": 100}, "chunked"),
        ({"V": 64}, "chunked"),
        ({"whole": False}, "chunked"),
        ({"S": 5000}, "chunked"),
        ({"T": softmax.CUDNN_FROM - 1}, "plain"),
        ({"T": 1, "S": 2**25}, "plain"),
    ],
)
def test_the_rule(change, name, cudnn):
    assert select_attention("cuda", **SIZES | change) == name
    of_numpy = {n: np.int64(x) if isinstance(x, int) else x for n, x in (SIZES | change).items()}
    assert select_attention("cuda", **of_numpy) == name
    elsewhere = "chunked" if name == "cudnn" else name
    assert {select_attention(x, **SIZES | change) for x in ("cpu", "rocm", "tpu")} == {elsewhere}


def test_the_rule_without_cudnn():
    softmax._is_taken_by_cudnn.cache_clear()
    if fused_attention_stablehlo.cuda_versions is None:
        assert select_attention("cuda", **SIZES) == "chunked"
    with pytest.raises(ValueError, match="platform='gpu' is not known; it may be one of 'cpu'"):
        select_attention("gpu", **SIZES)


def lowered(run, *arrays):
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    return [text.count(f"@{name}(") for name in (FORWARD, BACKWARD)]


def test_a_layer_for_nvidia(cudnn):
    """Padding stands behind what counts, so that a causal mask is all that there is."""
    sizes = {"num_heads": 2, "head_dim": 16, "num_kv_heads": 1, "max_length": 8}
    make = lambda: SoftmaxAttention(32, **sizes, dtype="bfloat16", rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(make))
    x = jax.ShapeDtypeStruct((3, 384, 32), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct(x.shape[:2], bool)

    def loss(params, x, mask, segment_ids=None):
        y, _ = nnx.merge(graph, params)(x, mask=mask, segment_ids=segment_ids)
        return jnp.sum(y.astype(jnp.float32))

    assert calls(lowered(loss, params, x, mask)) == [1, 0]
    text = lowered(jax.grad(loss), params, x, mask)
    assert calls(text) == [2, 1]
    assert "384x384" not in text
    ids = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
    assert calls(lowered(loss, params, x, mask, ids)) == [0, 0]


def test_blocks_for_nvidia(cudnn):
    """What a scan over blocks keeps is free of scores, and outputs are computed once."""
    places = places_of(2, 256)
    keep = jax.checkpoint_policies.save_only_these_names(softmax.POINT)

    def loss(x):
        def block(x, _):
            return attend(x, x, x, places, whole=True), None

        y, _ = jax.lax.scan(jax.checkpoint(block, policy=keep), x, length=3)
        return jnp.sum(y.astype(jnp.float32))

    text = lowered(jax.grad(loss), jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.bfloat16))
    assert calls(text) == [2, 1]
    assert "256x256" not in text


def test_mapped_for_nvidia(cudnn):
    """Runs of one program are more rows, also where some arrays are shared."""
    places = places_of(2, 128)
    run = lambda *x: both(lambda *x: attend(*x, places, window=9, whole=True), *x)
    x = jax.ShapeDtypeStruct((2, 128, 4, 16), jnp.bfloat16)
    more = jax.ShapeDtypeStruct((5, *x.shape), x.dtype)
    text = lowered(jax.vmap(run, in_axes=(0, None, None, 0)), more, x, x, more)
    assert calls(text) == [2, 1]
    kernels = [line for line in text.splitlines() if f"@{FORWARD}" in line]
    assert len(kernels) == 3
    for kernel in kernels:
        assert re.search(r": \(tensor<10x128x4x16xbf16>", kernel)
        assert re.search(r"sliding_window_length\\22: 9\b", kernel)


@pytest.mark.parametrize("kind", AxisType)
def test_meshes_for_nvidia(kind, cudnn):
    """Over several devices the forms run that the compiler cuts by itself, or what each has.

    Along one of the axes nothing lies.
    """
    mesh = jax.make_mesh((2, 2), ("data", "other"), axis_types=(kind,) * 2)
    run = lambda x: attend(x, x, x, places_of(x.shape[0], 128), whole=True)
    spec = PartitionSpec("data")
    if kind == AxisType.Manual:
        mesh = jax.make_mesh((2, 2), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((2, 128, 4, 16), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    sizes = {"B": 2, "T": 128, "H": 4, "K": 16, "V": 16, "dtype": "bfloat16"}
    form = "plain" if kind == AxisType.Auto else "cudnn"
    with jax.set_mesh(mesh):
        assert calls(lowered(run, x)) == [int(form == "cudnn"), 0]
        if kind != AxisType.Manual:
            assert select_attention("cuda", **sizes) == form
    if kind == AxisType.Explicit:
        whole = jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        )
        loss = lambda x: jnp.sum(run(x).astype(jnp.float32))
        assert [calls(lowered(jax.grad(loss), x)) for x in (x, whole)] == [[1, 1]] * 2


@pytest.mark.parametrize("window", [None, 9])
def test_what_cudnn_is_asked_for(window, cudnn, monkeypatch):
    """By JAX's own form of the same arguments; and what stands beside it on other platforms."""
    arrays, places = drawn(3, 2, 128, 128), places_of(2, 128)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    want = reference(*(np.asarray(x, np.float64) for x in narrow), places, window)
    whole = lambda *x: attend(*x, places, whole=True, window=window)
    assert "platform_index" in str(jax.make_jaxpr(whole)(*narrow[:3]))
    close(jax.jit(lambda *x: both(whole, *x))(*narrow), want, 1e-2)

    theirs = jax.nn.dot_product_attention
    plain = lambda *x, implementation, **keywords: theirs(*x, implementation="xla", **keywords)
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    run = lambda *x: softmax._cudnn(*x, window=window)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own form mixes them
        close(jax.jit(lambda *x: both(run, *x))(*narrow), want, 1e-2)


def test_no_operation_finds_an_infinity_where_there_is_none():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in drawn(0, keys=T))
    with jax.debug_infs(True):
        assert np.all(np.isfinite(softmax._plain(q, k, v, places_of(B, T), window=3)))
