"""Softmax attention over meshes: whole rows of its own heads on every device, kernels included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.compilers.collectives import collectives_by_axis
from deltaproduct_jax.layers.softmax import Places, attend, select_attention
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh

pytestmark = pytest.mark.usefixtures("all_devices")

B, T, H, K = 4, 128, 4, 16
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
MIXED = "data:2,tensor:2,sequence:2"
# Rows and heads of one device; of eight along the sequence, half have heads of zeros.
MESHES = {
    "data:8": (1, 4),
    "fsdp:2": (4, 4),
    "tensor:2": (8, 2),
    "sequence:2": (8, 2),
    "sequence:8": (8, 1),
    "tensor:4,data:2": (4, 1),
    MIXED: (4, 1),
    "fsdp:2,tensor:2,sequence:2": (4, 1),
}


def layout_over(mesh):
    return Layout(make_mesh(DeviceConfig(mesh=mesh)), {})


def whole_rows(rows, tokens=T):
    position = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    run = jnp.zeros_like(position)
    return Places(run, position, run, position)


def packed_rows(rows):
    """Segments that begin anywhere, at the edges of devices' pieces too."""
    starts = np.random.default_rng(1).random((rows, T)) < 0.05
    starts[:, [0, T // 2]] = True
    run = np.cumsum(starts, axis=1)
    position = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    run, position = (jnp.asarray(x, jnp.int32) for x in (run, position))
    return Places(run, position, run, position)


def gradients(layout, places, **options):
    """Of outputs weighted by others: what `attend` gives and gradients of all that it takes."""

    def run(q, k, v, do):
        with layout.placed():
            o, pull = jax.vjp(lambda *x: attend(*x, places, **options), q, k, v)
        return o, *pull(do)

    return jax.jit(run)


def compared(mesh, dtype, places, bar, **options):
    """Checks outputs and gradients over a mesh against one device; returns what devices send."""
    layout = layout_over(mesh)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (B, T, H, K), dtype) for key in keys]
    cut = NamedSharding(layout.mesh, PartitionSpec(("data", "fsdp"), "sequence", "tensor"))
    spread = [jax.device_put(x, cut) for x in arrays]
    compiled = gradients(layout, places, **options).lower(*spread).compile()
    found = compiled(*spread)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        plain = gradients(layout_over("data:1"), places, **options | {"whole": False})
        want = plain(*map(jnp.asarray, wide))
    for x, y in zip(found, want, strict=True):
        assert x.dtype == dtype
        assert x.sharding.is_equivalent_to(cut, x.ndim)
        assert relative_error(x, y) < bar
    return layout, collectives_by_axis(compiled.as_text(), layout.sizes)


@pytest.mark.parametrize("mesh", [MIXED, pytest.param("sequence:8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "window"), [("float32", None), pytest.param("bfloat16", 20, marks=pytest.mark.slow)]
)
def test_packed_rows_are_those_of_one_device(mesh, dtype, window):
    """And devices send each other along the sequence what they have, not whole rows."""
    bar = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    layout, sent = compared(mesh, dtype, packed_rows(B), bar, window=window)
    filled = max(layout.sizes["sequence"] * layout.sizes["tensor"], H)
    piece = B * T * filled * K * 4 // layout.mesh.size  # CPUs send bfloat16 as float32
    assert {(s.kind, s.axes) for s in sent} == {
        ("all-to-all", ("sequence",)),
        ("all-gather", ("sequence",)),
    }
    assert max(s.size for s in sent if s.kind == "all-to-all") == piece
    places = 4 * 4 * B * T // (layout.sizes["data"] * layout.sizes["fsdp"])
    assert max(s.size for s in sent if s.kind == "all-gather") <= places


@pytest.mark.parametrize(
    ("mesh", "window"),
    [
        (MIXED, 9),
        pytest.param(MIXED, None, marks=pytest.mark.slow),
        pytest.param("tensor:4,data:2", None, marks=pytest.mark.slow),
        pytest.param("sequence:8", 9, marks=pytest.mark.slow),
    ],
)
def test_what_cudnn_is_asked_for(mesh, window, cudnn, monkeypatch):
    """By JAX's own form of the same arguments, in the place of the kernel."""
    theirs = jax.nn.dot_product_attention
    plain = lambda *x, implementation, **keywords: theirs(*x, implementation="xla", **keywords)
    asked = []

    def on_gpu(*arrays, cuda, default):
        asked.append(arrays[0].shape)
        return cuda(*arrays)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)
    compared(mesh, "bfloat16", whole_rows(B), 1e-2, whole=True, window=window)
    assert set(asked) == {(B // layout_over(mesh).devices_of("batch"), T, 1, K)}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_of_a_gpu_mesh_runs_the_kernel(mesh, cudnn):
    layout, sizes = layout_over(mesh), {"B": 8, "T": T, "H": H, "K": K, "V": K, "dtype": "bfloat16"}
    cut = NamedSharding(layout.mesh, PartitionSpec(("data", "fsdp"), "sequence", "tensor"))
    x = jax.ShapeDtypeStruct((8, T, H, K), jnp.bfloat16, sharding=cut)
    traced = gradients(layout, whole_rows(8), whole=True).trace(x, x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows, heads = MESHES[mesh]
    for name, times in ((FORWARD, 2), (BACKWARD, 1)):
        shapes = re.findall(rf"@{re.escape(name)}\(.*?: \(tensor<(\w+)xbf16>", text)
        assert shapes == [f"{rows}x{T}x{heads}x{K}"] * times
    assert f"{T}x{T}" not in text  # no scores
    with layout.placed():
        assert select_attention("cuda", **sizes) == "cudnn"
        assert select_attention("tpu", **sizes) == "plain"
        assert select_attention("cuda", **sizes, whole=False) == "plain"
        assert select_attention("cuda", **sizes | {"dtype": "float32"}) == "plain"


def test_what_a_mesh_does_not_divide_is_left_to_the_compiler(cudnn):
    sizes = {"T": T, "K": K, "V": K, "dtype": "bfloat16"}
    with layout_over(MIXED).placed():
        assert select_attention("cuda", B=8, H=4, **sizes) == "cudnn"
        for change in ({"B": 7}, {"T": T + 1}, {"H": 3}, {"S": T + 8}):
            assert select_attention("cuda", **{"B": 8, "H": 4} | sizes | change) == "plain"
