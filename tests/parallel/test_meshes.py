"""The same numbers on any mesh: of steps, of whole runs, after a kill, and from mesh to mesh."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import curve, lasting, rows_in, run_config

from deltaproduct_jax.compilers.collectives import collectives_by_axis
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.layers.short_conv import ShortConv
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.sequence_model import Block
from deltaproduct_jax.ops.parts import placement
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh
from deltaproduct_jax.settings import make_key
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.tasks.task import Batch, batch_key
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.progress import Progress
from deltaproduct_jax.training.start import first_state, layout_of, shapes_of
from deltaproduct_jax.training.step import accumulated, make_train_step

pytestmark = pytest.mark.usefixtures("all_devices")

ONE = "data:1"
MIXED = "data:2,fsdp:2,tensor:2"
LONG = "fsdp:2,tensor:2,sequence:2"
ROWS = "data:2,fsdp:4"
TASK = GroupTask("Z3", train_length=6)  # 7 positions, which no axis divides


def config_of(mixer, **fields) -> RunConfig:
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 16, "intermediate_size": 16}
    model = ModelConfig(vocab_size=TASK.vocab_size, mixer=mixer, **(sizes | fields))
    return RunConfig(TASK, model, TrainConfig(batch_size=8, eval_batch_size=8, learning_rate=1e-3))


def first_losses(config: RunConfig, mesh: str, steps: int, scales=(1.0,)) -> list[np.ndarray]:
    """Loss and norms of the first steps, from parameters that are multiplied by each scale."""
    make = lambda: SequenceModel(config.model, rngs=nnx.Rngs(make_key(1)))
    layout = layout_of(config, make, DeviceConfig(mesh=mesh))
    definition, _ = shapes_of(config, make)
    optimizer, schedule = make_optimizer(config.train), make_schedule(config.train)
    update = make_train_step(
        definition, optimizer, schedule, config.train.accumulation_steps, layout
    )

    @jax.jit
    def step(state):
        batch = TASK.batch(batch_key(make_key(0), "train", state.step), 8, TASK.train_length)
        return update(state, layout.cut_batch(batch))

    first, found = first_state(config, make, layout), []
    for scale in scales:
        state = first._replace(params=jax.tree.map(lambda x, s=scale: x * s, first.params))
        rows = []
        for _ in range(steps):
            state, metrics = step(state)
            rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")])
        pairs = zip(*map(jax.tree.leaves, (state, layout.shardings(state))), strict=True)
        assert all(leaf.sharding.is_equivalent_to(wanted, leaf.ndim) for leaf, wanted in pairs)
        found.append(np.array(rows))
    return found


def check_same_numbers(config: RunConfig, meshes: list[str], steps: int) -> None:
    """Losses within 1e-5 of one device's, but where rounding alone takes that further from itself.

    It does where a key or a head's output comes near 0, which a norm magnifies.
    """
    expected, nudged = first_losses(config, ONE, steps, scales=(1.0, 1 + 2.0**-22))
    assert expected[-1, 0] < expected[0, 0]
    apart = lambda found: np.abs(found / expected - 1)
    by_rounding = apart(nudged)
    bar = np.maximum([1e-5, 1e-4, 1e-4], 30 * np.maximum.accumulate(by_rounding, axis=0))
    assert (bar[0] < 1e-3).all()
    for mesh in meshes:
        (found,) = first_losses(config, mesh, steps)
        np.testing.assert_array_less(apart(found), bar, err_msg=mesh)


def test_the_first_steps_are_the_same():
    """Two factors a token, a gate and convolutions, whose inputs lie behind an edge of a piece."""
    config = config_of("gated_delta_product", use_short_conv=True, implementation="recurrent")
    check_same_numbers(config, [LONG, ROWS], steps=3)


@pytest.mark.parametrize(("mesh", "rows"), [(ROWS, 1), (MIXED, 8)])
def test_blocks_meet_a_device_s_own_rows_where_rows_alone_are_cut(mesh, rows):
    config = config_of("delta_product", remat="products")
    make = lambda: SequenceModel(config.model, rngs=nnx.Rngs(0))
    layout, met = layout_of(config, make, DeviceConfig(mesh=mesh)), []

    class Watched(Block):
        def __call__(self, x, **read):
            met.append((x.shape[0], placement() is None))
            return super().__call__(x, **read)

    def loss(params, ids):
        with layout.placed():
            model = nnx.merge(nnx.split(make())[0], params)
            for block in model.layers:
                block.__class__ = Watched
            return jnp.sum(model(ids)[0])

    params = jax.eval_shape(lambda: nnx.split(make())[1])
    jax.eval_shape(jax.grad(loss), params, jax.ShapeDtypeStruct((8, 4), jnp.int32))
    assert set(met) == {(rows, rows < 8)}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_first_50_steps_of_every_mixer_are_the_same(mixer):
    fields = {"remat": "products"} if mixer.startswith("gated") else {}
    config = config_of(mixer, num_layers=2, **fields)
    meshes = ["data:8", "fsdp:8", "tensor:2", "sequence:2", MIXED, LONG]
    check_same_numbers(config, meshes, steps=50)


def test_each_part_of_an_accumulated_batch_lies_as_a_batch_does():
    """Or devices would have whole parts, and send them around for every one of them."""
    layout = Layout(make_mesh(DeviceConfig(mesh="data:2,sequence:4")), {})
    batch = Batch(*[jnp.arange(4 * 8).reshape(4, 8)] * 2, jnp.ones((4, 8), bool))
    inputs = lambda params, part, count: (part.inputs, {})
    summed, _ = jax.jit(accumulated(inputs, 2, layout))(None, batch, jnp.float32(1))
    np.testing.assert_array_equal(summed, batch.inputs[:2] + batch.inputs[2:])
    assert summed.sharding.shard_shape(summed.shape) == (1, 2)


@pytest.mark.slow
def test_accumulated_steps_are_the_same():
    config = config_of("delta_product")
    train = TrainConfig(batch_size=8, accumulation_steps=2, clip_norm=0.5, eval_batch_size=8)
    check_same_numbers(RunConfig(TASK, config.model, train), [MIXED, "fsdp:4"], steps=10)


@pytest.mark.parametrize("T", [16, 8])  # pieces longer, and shorter, than what a token reads
def test_a_convolution_over_pieces_reads_what_stands_before_them(T):
    """Packed rows too, where segments begin inside of pieces."""
    rng = np.random.default_rng(0)
    layout = Layout(make_mesh(DeviceConfig(mesh="sequence:4,data:2")), {})
    cut = NamedSharding(layout.mesh, PartitionSpec("data", "sequence"))
    normal = nnx.initializers.normal(1.0)
    conv = ShortConv(6, activation="tanh", kernel_init=normal, rngs=nnx.Rngs(0))
    u, state = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, T, 2, 3), (2, 3, 6)))
    run = jnp.asarray(np.cumsum(rng.random((2, T)) < 0.2, axis=1), jnp.int32)

    def outputs(u, state):
        y, after = conv(u, state, run)
        return jnp.sum(jnp.sin(y) * (1 + jnp.arange(T))[None, :, None, None]), (y, after)

    def over_pieces(u, state):
        with layout.placed():
            return outputs(jax.lax.with_sharding_constraint(u, cut), state)

    gradient = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))
    whole = gradient(outputs)(u, state)
    compiled = gradient(over_pieces).lower(u, state).compile()
    for a, b in zip(*map(jax.tree.leaves, (compiled(u, state), whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if T == 16:
        sent = collectives_by_axis(compiled.as_text(), layout.sizes)
        halo = 4 * 1 * 3 * 6
        permuted = [s.size for s in sent if s.kind == "collective-permute"]
        assert permuted
        assert max(permuted) == halo


def test_no_device_ever_holds_the_whole_model():
    config = config_of("delta_product", intermediate_size=4096)
    make = lambda: SequenceModel(config.model, rngs=nnx.Rngs(make_key(1)))
    layout = Layout.of_model(DeviceConfig(mesh="fsdp:8"), make)
    state = first_state(config, make, layout)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < 1.05 * total / 8
    alone = first_state(config, make, Layout.of_model(DeviceConfig(mesh=ONE), make))
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    pointers = [
        s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for s in x.addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)  # so that all may be donated


class Killed(BaseException):
    """Stands in for SIGKILL: nobody handles it."""


def train(workdir, mesh, **settings):
    devices = DeviceConfig(mesh=mesh, **settings)
    return loop.train(run_config(hidden_size=16), workdir, ["test"], devices=devices)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, all_devices):
    """A run on one device, the same over a mesh, and that one killed behind step 8."""
    folder = tmp_path_factory.mktemp("runs")
    show = Progress.show

    def shown(self, row):
        show(self, row)
        if row["step"] == 8:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, tiny_run.compiled_once(folder / "compiled"):
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        results = {ONE: train(folder / "one", ONE, profile_steps="3:3")}
        results[MESH] = train(folder / "mesh", MESH)
        with patch.context() as killing:
            killing.setattr(Progress, "show", shown)
            with pytest.raises(Killed):
                train(folder / "killed", MESH)
        yield folder, results


MESH = "data:2,fsdp:2,sequence:2"


def test_a_run_over_a_mesh_is_the_run_of_one_device(runs):
    folder, results = runs
    one, mesh = (rows_in(folder / name) for name in ("one", "mesh"))
    assert all(
        b.keys() - a.keys() == {"tokens_per_second_per_device"}
        for a, b in zip(one, mesh, strict=True)
    )
    for a, b in zip(curve(one), curve(mesh), strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    (start,) = json.loads((folder / "mesh/run.json").read_text())["starts"]
    assert start["mesh"] == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert results[MESH]["best_step"] == results[ONE]["best_step"]
    for a, b in zip(results[ONE]["test"], results[MESH]["test"], strict=True):
        assert b["strict"] == a["strict"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert (folder / "one/config.json").read_text() == (folder / "mesh/config.json").read_text()


def test_a_trace_of_some_steps(runs):
    folder, _ = runs
    assert list((folder / "one/profile").rglob("*.xplane.pb"))
    assert not (folder / "mesh/profile").exists()
    with pytest.raises(ConfigError, match=r"^profile_steps='13:14' begins behind .* to steps=12$"):
        train(folder / "late", ONE, profile_steps="13:14")
    assert not (folder / "late").exists()


def test_killed_and_resumed_on_the_same_mesh_it_is_the_same_bit_for_bit(runs, tmp_path):
    folder, results = runs
    workdir = shutil.copytree(folder / "killed", tmp_path / "run")
    assert [row["step"] for row in rows_in(workdir)] == [2, 4, 6, 8]
    again = train(workdir, MESH, profile_steps="5:7")  # from step 6
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert lasting(again) == lasting(results[MESH])
    assert curve(rows_in(workdir)) == curve(rows_in(folder / "mesh"))


@pytest.mark.parametrize("mesh", ["fsdp:8", ONE])
def test_a_run_goes_on_over_another_mesh(runs, tmp_path, mesh, capsys):
    folder, results = runs
    workdir = shutil.copytree(folder / "killed", tmp_path / "run")
    again = train(workdir, mesh, profile_steps="5:6")
    assert "profile_steps='5:6' writes no trace: the run goes on after step 6" in (
        capsys.readouterr().err
    )
    assert again["best_step"] == results[MESH]["best_step"]
    for a, b in zip(rows_in(workdir), rows_in(folder / "mesh"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
