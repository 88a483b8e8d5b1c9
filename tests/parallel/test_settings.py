"""The mesh as a setting, names of parameters, and the line about a size that is not divided."""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from campaign.damage import cases
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from tiny_run import run_config

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import require_directory
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel import layout
from deltaproduct_jax.parallel.config import AXES, DEFAULT_MESH, DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import MESH_AXES, cut, names_of_model
from deltaproduct_jax.parallel.processes import keep_programs
from deltaproduct_jax.tasks.registry import TASKS
from deltaproduct_jax.training.start import layout_of

pytestmark = pytest.mark.usefixtures("all_devices")
SIZES = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}


def model_of(mixer, **fields):
    having = MIXERS[mixer].takes
    more = {"use_short_conv": True, "use_output_gate": True, "beta_bias": 1.0}
    fields = {name: value for name, value in more.items() if having(name)} | fields
    config = ModelConfig(vocab_size=6, mixer=mixer, num_layers=2, **SIZES, **fields)
    return nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))


def sizes(**given):
    return dict.fromkeys(AXES, 1) | given


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (DEFAULT_MESH, 8, {"data": 8}),
        (DEFAULT_MESH, 1, {}),
        ("fsdp:-1,tensor:2", 8, {"fsdp": 4, "tensor": 2}),
        ("data:2, sequence:2", 8, {"data": 2, "sequence": 2}),
    ],
)
def test_devices_along_the_axes(mesh, devices, expected):
    assert DeviceConfig(mesh=mesh).sizes_of(devices) == sizes(**expected)


@pytest.mark.parametrize(
    "mesh",
    [
        *("", "data", "data:0", "data:-2", "data:1.5", "rows:2", "data:2,data:2", "data:²"),
        f"data:{'1' * 5000}",
    ],
)
def test_a_mesh_that_is_none(mesh):
    with pytest.raises(ConfigError, match="it may be as 'data:-1,fsdp:1,tensor:1,sequence:1'"):
        DeviceConfig(mesh=mesh)


@cases(60)
@given(
    st.dictionaries(st.sampled_from(AXES), st.integers(1, 4), min_size=1),
    st.sampled_from([*AXES, None]),
    st.integers(1, 4),
)
def test_a_mesh_takes_the_devices_that_it_names_or_all(named, rest, times):
    """What is written in any order is read, and -1 is what is left."""
    written = named | ({rest: -1} if rest in named else {})
    config = DeviceConfig(mesh=", ".join(f"{name}:{size}" for name, size in written.items()))
    assert config.sizes() == sizes(**written)
    fixed = math.prod(size for size in written.values() if size > 0)
    found = config.sizes_of(fixed * times)
    assert list(found) == list(AXES)
    assert math.prod(found.values()) == fixed * (times if rest in named else 1)
    assert all(found[name] == size for name, size in written.items() if size > 0)


def test_meshes_that_do_not_fit():
    with pytest.raises(ConfigError, match="has -1 more than once"):
        DeviceConfig(mesh="data:-1,fsdp:-1")
    with pytest.raises(ConfigError, match="takes a multiple of 3 devices; there are 8"):
        DeviceConfig(mesh="data:-1,fsdp:3").sizes_of(8)
    with pytest.raises(ConfigError, match="takes 16 devices; there are 8"):
        DeviceConfig(mesh="data:16").sizes_of(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator_address": "h:1"}, "num_processes is missing"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
        ({"coordinator_address": "h:1", "num_processes": 0, "process_id": 0}, "at least 1"),
        *[
            ({"coordinator_address": a, "num_processes": 2, "process_id": 0}, "may be host:port")
            for a in ("host", ":1", "host:port", "host:0", "host:65536", f"host:{'1' * 5000}", "")
        ],
        ({"distributed": 1}, "true or false"),
        ({"profile_steps": "13:10"}, "profile_steps='13:10' .* '10:13'"),
        ({"profile_steps": "3"}, "profile_steps='3'"),
        ({"profile_steps": "0:3"}, "profile_steps='0:3'"),
        ({"profile_steps": f"1:{'9' * 5000}"}, "profile_steps='1:999"),
    ],
)
def test_settings_that_are_none(fields, message):
    with pytest.raises(ConfigError, match=message):
        DeviceConfig(**fields)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_of_ours_has_names(mixer):
    names = names_of_model(model_of(mixer))
    assert [path for path, found in names.items() if found is None] == []
    assert {name for found in names.values() for name in found} <= {*MESH_AXES, None}
    blocks = {path: found for path, found in names.items() if path[2:3] == ("attn",)}
    assert any("heads" in found for found in blocks.values())


def test_a_parameter_from_outside_says_its_names_itself():
    class Outside(nnx.Module):
        def __init__(self):
            own = {"out_sharding": ("mlp", "embed"), "eager_sharding": False}
            self.named = nnx.Param(np.zeros((4, 4)), **own)
            self.nameless = nnx.Param(np.zeros((2, 6)))

    model = Outside()
    assert names_of_model(model) == {("named",): ("mlp", "embed"), ("nameless",): None}
    mesh = Layout.of_model(DeviceConfig(mesh="fsdp:2,tensor:2"), Outside)
    found = mesh.shardings({"named": np.zeros((4, 4)), "nameless": np.zeros((2, 6))})
    assert found["named"].spec == PartitionSpec("tensor", "fsdp")
    assert found["nameless"].spec == PartitionSpec(None, "fsdp")  # its longest axis


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "heads"), (8, 6), ("fsdp", "tensor")),
        (("vocab", "embed"), (7, 8), (None, "fsdp")),
        (("embed", "heads"), (6, 8), (None, "tensor")),  # 4 does not divide 6
        (None, (3, 4, 12), (None, None, "fsdp")),
        (None, (), ()),
    ],
)
def test_where_a_parameter_is_cut(names, shape, expected):
    found = sizes(fsdp=4, tensor=2)
    assert cut(names, shape, found) == expected
    whole = tuple(None if axis == "fsdp" else axis for axis in expected)
    assert cut(names, shape, found, fsdp=False) == whole


def test_every_logical_axis_says_what_cuts_it():
    """Over all four axes of a mesh, as the message about a size that is not divided has it."""
    cuts = {"data": 2, "fsdp": 3, "sequence": 5, "tensor": 7}
    mesh = SimpleNamespace(shape=cuts, size=210)
    many, one = Layout(mesh, {}), Layout(SimpleNamespace(shape=sizes(), size=1), {})
    expected = {
        "batch": (6, "data and fsdp"),
        "sequence": (5, "sequence"),
        "vocab": (7, "tensor"),
        "heads": (7, "tensor"),
        "mlp": (7, "tensor"),
        "embed": (3, "fsdp"),
    }
    assert expected.keys() == MESH_AXES.keys()
    for name, (devices, axes) in expected.items():
        assert many.devices_of(name) == devices
        many.require_divisible(name, width=2 * devices, other=None)
        with pytest.raises(
            ConfigError, match=f"^width={devices + 1} must be a multiple of the {devices} devices "
            f"of mesh axis {axes}; give another mesh or width$"
        ):  # fmt: skip
            many.require_divisible(name, other=devices, width=devices + 1)
        one.require_divisible(name, width=1)


@pytest.mark.parametrize("name", [name for name in MESH_AXES if name != "batch"])
def test_where_an_axis_of_each_name_is_cut(name):
    """Where its size is divided; another of the same name, which nothing is left for, is whole."""
    (axis,), found = MESH_AXES[name], sizes(fsdp=13, sequence=5, tensor=7)
    size = found[axis]
    assert cut((name, None), (2 * size, 1), found) == (axis, None)
    assert cut((None, name), (1, 2 * size + 1), found) == (None, None)
    assert cut((name, name), (size, size), found).count(axis) == 1
    assert cut((name,), (size,), sizes()) == ((None,) if name == "embed" else (axis,))


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        ("data:4,fsdp:2", {"batch_size": 12}, "batch_size=12 .* 8 devices .* data and fsdp"),
        ("data:8", {"eval_batch_size": 4}, "eval_batch_size=4 .* 8 devices of mesh axis data"),
        ("data:4", {"accumulation_steps": 4}, "accumulation_steps=2 .* 4 devices"),
        ("tensor:2", {"num_heads": 3}, "num_heads=3 .* 2 devices of mesh axis tensor"),
        (
            "tensor:4",
            {"attention_every": 2, "attention_heads": 2, "num_layers": 2},
            "attention_heads=2 .* 4 devices of mesh axis tensor",
        ),
        ("tensor:2", {"intermediate_size": 9}, "intermediate_size=9 .* mesh axis tensor"),
        ("fsdp:4", {"hidden_size": 6}, "hidden_size=6 .* 4 devices of mesh axis fsdp"),
    ],
)
def test_a_size_that_an_axis_does_not_divide(mesh, fields, message):
    config = run_config(**fields)
    make = lambda: SequenceModel(config.model, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=message):
        layout_of(config, make, DeviceConfig(mesh=mesh))


@pytest.mark.parametrize("name", [name for name in TASKS if hasattr(TASKS[name], "batch")])
def test_a_row_depends_on_its_number_and_not_on_how_many_there_are(name):
    """So that any process can draw its own rows, and those alone."""
    task = TASKS[name]()
    draw = jax.jit(task.batch, static_argnums=(1, 2))  # op by op it takes three times as long
    few, many = (draw(jax.random.key(3), rows, task.train_length) for rows in (4, 12))
    for a, b in zip(few[:3], many[:3], strict=True):
        np.testing.assert_array_equal(a, b[:4])
    assert len({np.asarray(row).tobytes() for row in many.inputs}) > 6


def test_settings_of_devices_are_no_fields_of_a_run():
    """They are not in config.json, so that a run goes on over any mesh."""
    sections = run_config().to_dict().values()
    fields = itertools.chain.from_iterable(sections)
    assert not {field.name for field in dataclasses.fields(DeviceConfig)} & set(fields)


@pytest.mark.parametrize(
    ("mesh", "rows", "devices"), [("data:2,fsdp:2,tensor:2", 6, 4), ("fsdp:8", 4, 8)]
)
def test_rows_that_a_mesh_does_not_divide_are_not_cut(mesh, rows, devices):
    cut = Layout(layout.make_mesh(DeviceConfig(mesh=mesh)), {}).cut_batch
    tokens = np.zeros((rows, 5), np.int32)
    for batch, parts in ((tokens, False), (tokens[None], True)):
        with pytest.raises(ConfigError, match=f"^B={rows} must be a multiple of the {devices} dev"):
            cut(batch, parts=parts)
    assert cut(np.zeros((8, 5), np.int32)).shape == (8, 5)


def test_where_no_programs_can_be_kept_is_named(tmp_path):
    """JAX would compile all anew at each start, without a word."""
    there = tmp_path / "file"
    there.touch()
    with pytest.raises(ConfigError, match=r"^compilation_cache='.*file' cannot be used: File exis"):
        keep_programs(DeviceConfig(compilation_cache=str(there)))
    assert jax.config.jax_compilation_cache_dir != str(there)


def test_a_bucket_is_no_directory():
    for bucket in ("gs://bucket/run", "s3://bucket/run"):
        with pytest.raises(
            RunDirectoryError, match=f"^workdir={bucket} is in a bucket, which has no locks"
        ):
            require_directory(Path(bucket), "workdir")


class FakeDevice(SimpleNamespace):
    """A device of some process and slice, where there are slices."""

    platform, device_kind = "cpu", "cpu"

    def __hash__(self):
        return self.id


def devices_of(processes, each, **fields):
    return [
        FakeDevice(id=i, process_index=i // each, **{n: f(i) for n, f in fields.items()})
        for i in range(processes * each)
    ]


def grid_of(monkeypatch, devices, **settings):
    """Ids of the devices by their place along data, fsdp, sequence, tensor."""
    monkeypatch.setattr(layout, "all_devices", lambda: devices)
    monkeypatch.setattr(layout, "Mesh", lambda grid, *_, **__: grid)
    grid = layout.make_mesh(DeviceConfig(**settings))
    return np.vectorize(lambda device: device.id)(grid)


def test_some_of_a_pod_s_chips_make_a_mesh(monkeypatch):
    """For all of them JAX knows the links between them, for a part it has no order."""
    places = [(x, y, 0) for y in range(2) for x in range(4)]
    chips = devices_of(1, 8, coords=places.__getitem__, core_on_chip=lambda i: 0)
    for chip in chips:
        chip.platform, chip.device_kind = "tpu", "TPU v5 lite"
    assert grid_of(monkeypatch, chips, mesh="data:3").ravel().tolist() == [0, 1, 2]
    assert grid_of(monkeypatch, chips, mesh="fsdp:3,tensor:2").shape == (1, 3, 1, 2)
    assert sorted(grid_of(monkeypatch, chips, mesh="data:8").flat) == list(range(8))


def test_the_devices_of_a_process_are_neighbours(monkeypatch):
    devices = devices_of(2, 4)
    grid = grid_of(monkeypatch, devices, mesh="fsdp:-1", dcn_mesh="data:2")
    assert grid.squeeze().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Along one axis, whose pieces in each process are not torn apart.
    grid = grid_of(monkeypatch, devices, mesh="fsdp:2,tensor:2", dcn_mesh="fsdp:-1")
    assert grid.shape == (1, 4, 1, 2)
    assert grid.squeeze().tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    grid = grid_of(monkeypatch, devices, mesh="fsdp:2,tensor:2", dcn_mesh="tensor:2")
    assert grid.squeeze().tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_slices_go_before_processes(monkeypatch):
    devices = devices_of(4, 2, slice_index=lambda i: i // 4)
    shuffled = [devices[i] for i in (5, 0, 3, 6, 1, 7, 2, 4)]
    grid = grid_of(monkeypatch, shuffled, mesh="fsdp:4", dcn_mesh="data:2")
    assert [set(row) for row in grid.squeeze().tolist()] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    one = devices_of(4, 2, slice_index=lambda i: 0)
    assert grid_of(monkeypatch, one, mesh="fsdp:2", dcn_mesh="data:4").shape == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dcn_mesh": "data:3"}, "dcn_mesh='data:3' takes 3 slices or processes; there are 2"),
        ({"dcn_mesh": "data:1"}, "dcn_mesh='data:1' must take all of the 2 slices or processes"),
        ({"dcn_mesh": "data:-1,fsdp:3"}, "takes a multiple of 3 slices or processes; there are 2"),
        ({"dcn_mesh": "data:2", "mesh": "fsdp:8"}, "mesh='fsdp:8' takes 8 devices; there are 4"),
        ({"dcn_mesh": "data:2", "mesh": "fsdp:2"}, "'fsdp:2' takes 2 of 4 devices; with dcn_mesh"),
    ],
)
def test_slices_that_do_not_fit(settings, message, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        grid_of(monkeypatch, devices_of(2, 4), **settings)


def test_slices_of_different_sizes(monkeypatch):
    devices = [*devices_of(2, 3), FakeDevice(id=6, process_index=1)]
    with pytest.raises(ConfigError, match=r"as many devices in each .*; there are 3, 4"):
        grid_of(monkeypatch, devices, dcn_mesh="data:2")


@pytest.mark.parametrize("dcn_mesh", ["", "rows:2", "data:0", "data:-1,fsdp:-1"])
def test_slices_that_are_none(dcn_mesh):
    with pytest.raises(ConfigError, match=f"^dcn_mesh='{dcn_mesh}' (is not known|has -1 more)"):
        DeviceConfig(dcn_mesh=dcn_mesh)
