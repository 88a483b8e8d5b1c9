"""Kernels of GPUs over meshes: which of a block's run, and ways back that read single tokens."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from children import printed
from flax import nnx
from helpers import relative_error
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.compilers.collectives import collectives_by_axis
from deltaproduct_jax.layers.delta_product import GatedDeltaProduct
from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.convolution.selection import Choice
from deltaproduct_jax.ops.kernels.triton import row_passes
from deltaproduct_jax.ops.parts import with_past
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh
from experiments.lib import environment

pytestmark = pytest.mark.usefixtures("all_devices")

ROOT = Path(__file__).resolve().parents[2]
B, T, D, F, EPS = 4, 64, 16, 32, 1e-6
MIXED = "fsdp:2,tensor:2,sequence:2"
# q, k, v and beta are read where one product has put them.
JOINED = {"convolve_parts": 1, "convolve_parts_back": 1}


def norm_forward(x, scale, *, eps, more=None, reached=None, looks=False):
    """The kernel's arguments and results, of what is finite."""
    x = x if more is None else x + more
    bad = jnp.zeros(x.shape[:1], bool) if looks else None
    return x, rows.norm(x, scale, eps, x.dtype), jnp.mean(x * x, axis=-1), bad


def norm_back(x, mean_square, scale, dy, dx_after=None, reached=None, *, eps, again=False):
    """The same."""
    normed = lambda x, scale: rows.norm(x, scale, eps, x.dtype)
    y, pull = jax.vjp(normed, x, scale)
    dx, dscale = pull(dy)
    return dx if dx_after is None else dx + dx_after, dscale, y if again else None


def swiglu(hidden):
    """The same."""
    F = hidden.shape[-1] // 2
    return jax.nn.silu(hidden[:, :F]) * hidden[:, F:]


def swiglu_back(hidden, dh, *, again=True):
    """The same."""
    h, pull = jax.vjp(swiglu, hidden)
    return pull(dh)[0], h if again else None


@pytest.fixture
def on_gpu(monkeypatch):
    """Programs are those of GPUs, with others in the place of kernels; what these are given."""
    given = []

    def noted(name, run):
        def stand_in(*arrays, **options):
            given.append((name, *(arrays[0].shape)))
            return run(*arrays, **options)

        return stand_in

    monkeypatch.setattr(kernels, "is_installed", lambda name: name == "triton")
    run = lambda *arrays, cuda, default: cuda(*arrays)
    monkeypatch.setattr(jax.lax, "platform_dependent", run)
    for stand_in in (norm_forward, norm_back, swiglu, swiglu_back):
        name = stand_in.__name__
        monkeypatch.setattr(row_passes, name, noted(name, stand_in))
    return given


@pytest.mark.parametrize(
    "mesh",
    [MIXED, *(pytest.param(m, marks=pytest.mark.slow) for m in ("tensor:8", "sequence:8"))],
)
def test_norms_and_the_mlp_on_every_device_s_own_tokens(mesh, on_gpu):
    """And no device is sent more than sums of what others have of its tokens."""
    layout = Layout(make_mesh(DeviceConfig(mesh=mesh)), {})
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = {"x": (B, T, D), "scale": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}
    arrays = [0.3 * jax.random.normal(next(keys), shape) for shape in shapes.values()]
    specs = ((("data", "fsdp"), "sequence"), (), (None, "tensor"), (None, "tensor"), ("tensor",))
    cut = [NamedSharding(layout.mesh, PartitionSpec(*spec)) for spec in specs]

    def gradient(layout, *arrays):
        def loss(x, scale, *mlp):
            with layout.placed():  # as in training, for the way forward alone
                assert rows.may_run(x, F)
                x, y, bad = rows.forked_norm(x, scale, EPS)
                gate, up, down = mlp
                join = jnp.concatenate if layout.is_one else jnp.stack
                mlp = (join([gate, up], axis=1), down, EPS)
                return jnp.sum(jnp.sin(rows.residual_swiglu(x, jnp.cos(y), bad, scale, *mlp)))

        return jax.grad(loss, (0, 1, 2, 3, 4))(*arrays)

    spread = jax.device_put(arrays, cut)
    compiled = jax.jit(lambda *x: gradient(layout, *x)).lower(*spread).compile()
    devices = layout.sizes
    own = B * T // (devices["fsdp"] * devices["sequence"])
    width = 2 * F // devices["tensor"]
    of_norms, of_mlp = ("norm_forward", "norm_back"), ("swiglu", "swiglu_back")
    assert set(on_gpu) == {
        *((name, own, D) for name in of_norms),
        *((name, own, width) for name in of_mlp),
    }
    one = Layout(make_mesh(DeviceConfig(mesh="data:1")), {})
    want = jax.jit(lambda *x: gradient(one, *x))(*arrays)
    for got, wanted in zip(compiled(*spread), want, strict=True):
        assert relative_error(got, wanted) < 1e-5
    sent = collectives_by_axis(compiled.as_text(), layout.sizes)
    assert {s.kind for s in sent} == {"all-reduce"}
    for found in sent:
        largest = own * D if found.axes == ("tensor",) else width * D
        assert found.size <= 4 * largest, found


def test_tokens_that_a_mesh_does_not_divide_are_left_to_the_compiler(on_gpu):
    with Layout(make_mesh(DeviceConfig(mesh=MIXED)), {}).placed():
        for shape, width, runs in [
            ((B, T, D), F, True),
            ((B + 1, T, D), F, False),
            ((B, T + 1, D), F, False),
            ((B, T, D), F + 1, False),
        ]:
            assert rows.may_run(jax.ShapeDtypeStruct(shape, jnp.float32), width) == runs


@pytest.mark.slow
def test_taps_of_parts_side_by_side_are_no_surprise_to_the_compiler(capfd):
    """They lie one part behind the other, of which a device's own are not neighbours."""
    layout = Layout(make_mesh(DeviceConfig(mesh=MIXED)), {})
    cut = NamedSharding(layout.mesh, PartitionSpec("fsdp", "tensor"))
    taps = jax.random.normal(jax.random.key(0), (4, 2 * D))
    u = jax.random.normal(jax.random.key(1), (B, T, 2, D))

    def convolved(arrays, before, taps):
        padded = jnp.concatenate([before, arrays], axis=1)
        shifted = [padded[:, w : w + arrays.shape[1]] for w in range(4)]
        return sum(x * tap for x, tap in zip(shifted, taps[:, None, None], strict=True))

    def gradient(layout, taps):
        def loss(taps):
            with layout.placed():
                before = jnp.zeros((B, 3, 2, D))
                y = with_past(convolved, u, before, taps.reshape(4, 2, D), on_each_device=True)
                return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(loss), out_shardings=taps.sharding)(taps)

    got = gradient(layout, jax.device_put(taps, cut))
    assert "rematerialization" not in capfd.readouterr().err
    one = Layout(make_mesh(DeviceConfig(mesh="data:1")), {})
    assert relative_error(got, gradient(one, taps)) < 1e-5


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (MIXED, {"num_householder": 2}),
        pytest.param(
            "tensor:4,data:2", {"num_v_heads": 8, "expand_v": 0.5}, marks=pytest.mark.slow
        ),
        pytest.param(
            "sequence:8", {"num_householder": 3, "num_v_heads": 8}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_one_product_makes_over_a_mesh_is_what_four_make_on_one_device(
    mesh, sizes, monkeypatch
):
    """q, k, v, beta and the states of convolutions, with gradients; segments that pieces cut."""
    fields = {"expand_v": 1.0, "use_forget_gate": False, "use_output_gate": False} | sizes
    layer = GatedDeltaProduct(D, num_heads=4, head_dim=8, rngs=nnx.Rngs(0), **fields)
    graph, params = nnx.split(layer)
    x, *drawn = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(x, (B, T, D))
    state = layer.init_state(B)
    tails = [jax.random.normal(k, a.shape) for k, a in zip(drawn, state[1:], strict=False)]
    state = state._replace(q_conv=tails[0], k_conv=tails[1], v_conv=tails[2])
    ids = jnp.sort(jax.random.randint(drawn[3], (B, T), 0, 4))

    def gradient(layout, choice):
        def loss(params, x, state):
            with layout.placed():
                found = nnx.merge(graph, params)._inputs(x, state, ids, None, choice)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(found)), found

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    one = Layout(make_mesh(DeviceConfig(mesh="data:1")), {})
    # Both make unit vectors, the latter by what is taken for a kernel of TPUs.
    run = lambda *arrays, default, **kernels: default(*arrays)
    monkeypatch.setattr(jax.lax, "platform_dependent", run)
    want = gradient(one, Choice(None, "plain", "pallas_tpu"))(params, x, state)
    over = Layout(make_mesh(DeviceConfig(mesh=mesh)), {})
    joined, reads = GatedDeltaProduct._read_together, []
    noted = lambda *given: reads.append(0) or joined(*given)
    monkeypatch.setattr(GatedDeltaProduct, "_read_together", noted)
    got = gradient(over, Choice(None, "triton"))(params, x, state)
    assert reads
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_delta_product", "transformer"])
def test_a_step_over_a_mesh_calls_the_kernels_of_one_device(mixer):
    if not environment.extra_folder("gpu").exists():
        pytest.skip("needs Triton (tests/run.py --extra=gpu)")
    meshes = ("data:1", "data:2,fsdp:2", "tensor:2", "sequence:2", MIXED)
    variables = {**os.environ, "PYTHONPATH": str(environment.extra_folder("gpu"))}
    command = [sys.executable, "-m", "tests.parallel.step_kernels", mixer, *meshes]
    alone, *over = map(json.loads, printed(command, cwd=ROOT, env=variables).splitlines())
    if mixer == "transformer":
        assert alone == {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 1}
        assert over == [alone] * len(over)
        return
    assert alone.keys() >= {"norm_back", "swiglu_back", "walk", "walk_back", *JOINED}
    for mesh, found in zip(meshes[1:], over, strict=True):
        found.pop("compose", None)  # of a row's pieces, where a device has few heads
        assert set(found) == set(alone), mesh
        for name in ("swiglu_back", *JOINED):
            assert found[name] == alone[name], mesh
        # Norms of heads are XLA's where a mesh cuts heads or tokens.
        cuts = "tensor" in mesh or "sequence" in mesh
        assert found["norm_back"] == alone["norm_back"] - cuts, mesh
