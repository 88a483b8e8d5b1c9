"""What the kernels of short convolutions are tested on: inputs, and programs around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ops.kernels import oracle_convolution

from deltaproduct_jax import GatedDeltaProduct
from deltaproduct_jax.layers.short_conv import ShortConv
from deltaproduct_jax.ops.convolution import dispatch, selection
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh

silu = jax.nn.silu
# Of the design for float32; else a few units of the last bit. Cotangents of taps are float32.
BARS = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    form: Form
    dtype: str = "float32"
    C: int = 24
    W: int = 4
    T: int = 13
    B: int = 2
    packed: bool = False
    rows: int | None = None  # groups of a program

    def arrays(self, seed=0):
        keys = jax.random.split(jax.random.key(seed), 4)
        draw = lambda i, *shape: jax.random.normal(keys[i], shape)
        tail, dtype = self.W - 1, self.dtype
        u, before = draw(0, self.B, self.T, self.C), draw(1, self.B, tail, self.C)
        taps, dy = draw(2, self.W, self.C), draw(3, self.B, self.T, self.C)
        run = past = None
        if self.packed:  # of one token, of three, and one that goes on behind a piece
            bounds = np.array([[2, 3, 6], [1, 5, 20]])
            run = (np.arange(self.T)[None, :, None] >= bounds[: self.B, None]).sum(-1)
            run, past = jnp.asarray(run, jnp.int32), jnp.zeros((self.B, tail), jnp.int32)
            past = past - (jnp.arange(tail) < 1)[None]  # one of another segment
        return *(x.astype(dtype) for x in (u, before)), taps, run, past, dy.astype(dtype)


def relative(x, reference):
    x, reference = (np.asarray(a, np.float64) for a in (x, reference))
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), 1e-30))


def errors(case, both):
    """Of outputs and cotangents, which ``both(form, *arrays)`` gives, against float64."""
    arrays = case.arrays()
    options = {"silu": case.form.activation is silu, "width": case.form.unit_width}
    y, gradients = oracle_convolution.short_convolution(*arrays, **options)
    results = both(case.form, *arrays)
    found = dict(zip(("y", "du", "dbefore", "dtaps"), results, strict=True))
    wanted = dict(zip(found, (y, *gradients), strict=True))
    return {name: relative(found[name], wanted[name]) for name in found}


def over_the_bar(found):
    """Those of ``found``, by case (dtype, errors), that are too large."""
    return {
        (name, what): error
        for name, (dtype, of_case) in found.items()
        for what, error in of_case.items()
        if not error <= BARS["float32" if what == "dtaps" else dtype]
    }


def mapped(name, C=24):
    """How far a mapped gradient is from the plain form's; of the taps too, or not."""
    case = Case(Form(silu, 8), packed=True, T=6, C=C)
    u, before, taps, run, past, dy = case.arrays()

    def gradient(choice):
        def one(u, taps):
            call = lambda u, taps: dispatch.short_convolution(
                choice, case.form, u, before, taps, run, past
            )
            return jax.vjp(call, u, taps)[1](dy)

        stacked = jnp.stack([u, 2 * u]), jnp.stack([taps, -taps])
        return jax.vmap(one)(*stacked), jax.vmap(one, in_axes=(0, None))(stacked[0], taps)

    pair = gradient(selection.by_name(name)), gradient(selection.PLAIN)
    return max(jax.tree.leaves(jax.tree.map(relative, *pair)))


MESHES = ("data:2", "tensor:2,sequence:2", "data:2,sequence:2", "sequence:4")


def meshed(mesh, name, C=32):
    """How far a convolution of 8 tokens over a mesh is from the plain one, and its gradients.

    Over four devices along the sequence a piece has fewer tokens than are read before one.
    """
    layout = Layout(make_mesh(DeviceConfig(mesh=mesh), jax.devices()[:4]), {})
    conv = ShortConv(C, activation="silu", kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(conv)
    case = Case(Form(silu, 8), C=C, packed=True, T=8)
    u, before, _, run, _, dy = case.arrays()
    u, dy = (x.reshape(2, 8, 1, C) for x in (u, dy))

    def loss(params, u, before, choice):
        conv = nnx.merge(graph, params)
        y, after = conv(u, before, run, unit_width=8, choice=choice)
        return jnp.sum(y * dy) + jnp.sum(after**2), y

    @functools.partial(jax.jit, static_argnums=3)
    def placed(params, u, before, choice):
        with layout.placed():
            run = lambda *arrays: loss(*arrays, choice)
            return jax.value_and_grad(run, (0, 1, 2), has_aux=True)(params, u, before)

    plainly = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    wanted = plainly(params, u, before, selection.PLAIN)
    found = placed(params, u, before, selection.by_name(name))
    return max(jax.tree.leaves(jax.tree.map(relative, found, wanted)))


def over_explicit_axes(name, C=24):
    """How far a convolution is whose sequences lie over explicit axes of a mesh."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    case = Case(Form(silu, 8), packed=True, T=6, C=C)
    u, before, taps, run, past, dy = case.arrays()

    def gradient(choice, *arrays):
        u, before, run, past, dy = arrays
        call = lambda u, taps: dispatch.short_convolution(
            choice, case.form, u, before, taps, run, past
        )
        y, pull = jax.vjp(call, u, taps)
        return y, pull(dy)

    arrays = (u, before, run, past, dy)
    found = jax.jit(gradient, static_argnums=0)(
        selection.by_name(name), *jax.device_put(arrays, spread)
    )
    wanted = gradient(selection.PLAIN, *arrays)
    return max(jax.tree.leaves(jax.tree.map(relative, found, wanted)))


def layer(kernel, head_dim=16, use_short_conv=True):
    """How far a layer is from the plain one: packed, padded, from a state, and its gradients."""
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    given = {"segment_ids": jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])}
    given |= {"mask": jnp.arange(9)[None] != jnp.asarray([[2], [7]])}

    def run(name):
        layer = made(name, jnp.float32, head_dim=head_dim, use_short_conv=use_short_conv)
        graph, params = nnx.split(layer)
        before = jax.tree.map(lambda x: x + 0.5, layer.init_state(2))

        def loss(params, x, before):
            y, state = nnx.merge(graph, params)(x, state=before, **given)
            return jnp.sum(y**2) + sum(jnp.sum(s**2) for s in state), (y, state)

        found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, before)
        return jax.tree.leaves(found)

    return max(map(relative, run(kernel), run("plain")))


def made(name, dtype=jnp.bfloat16, **options):
    sizes = {"num_heads": 2, "head_dim": 16, "expand_v": 1.0}
    options = sizes | {"conv_implementation": name, "dtype": dtype} | options
    return GatedDeltaProduct(16, **options, rngs=nnx.Rngs(0))
