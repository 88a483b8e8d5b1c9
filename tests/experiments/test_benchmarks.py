"""The benchmarks of the op: they check before they time, and write what they print."""

import inspect
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deltaproduct_jax import delta_product
from deltaproduct_jax.errors import ConfigError
from experiments.hardware.tpu_estimate import EstimateConfig
from experiments.lib import flags
from experiments.lib.bench import convolution as bench_convolution
from experiments.lib.bench import timing
from experiments.lib.bench.gpu_kernels import PassConfig
from experiments.lib.bench.peers import jax_packages as peer_jax
from experiments.op import containment as op_containment
from experiments.op import convolution_speed as op_convolution
from experiments.op import rule as op_rule
from experiments.op import scaling as op_scaling
from experiments.op import sharding as op_sharding
from experiments.op import speed as op_speed

TINY = ["--length=12", "--num_heads=2", "--head_dim=4", "--num_householder=2", "--repeats=2"]


def test_speed_writes_table_json_and_plot(tmp_path, capsys):
    op_speed.command([f"--workdir={tmp_path}", *TINY, "--value_dim=6", "--num_v_heads=4"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "speed.json").read_text())
    assert len(record["rows"]) == 2 * 3  # directions, implementations
    assert record["shape"] == "B=1 T=12 H=2 Hv=4 K=4 V=6, float32, gated"
    for row in record["rows"]:
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["worst_error"] < 1e-5
        assert (
            f"| {row['num_householder']} | {row['direction']} | {row['implementation']} " in printed
        )
        if row["implementation"] == "recurrent":
            assert row["times_faster_than_first"] == 1
    assert (tmp_path / "speed.md").read_text().strip() == printed.strip()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_several_sizes_and_both_kinds_of_gates_stand_in_one_record(tmp_path):
    sizes = ["--batch_size=2,1", "--length=6,12", "--gated=none"]
    more = ["--implementations=chunked", "--directions=forward"]
    op_speed.command([f"--workdir={tmp_path}", *TINY[1:], *sizes, *more])
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["shape"] == "B=2 T=6 and B=1 T=12 H=2 K=V=4, float32, gated and ungated"
    cases = [(row["batch_size"], row["length"], row["gates"]) for row in record["rows"]]
    assert cases == [(2, 6, "yes"), (2, 6, "no"), (1, 12, "yes"), (1, 12, "no")]
    assert "| B | T | gates | n_h |" in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
def test_decoding_is_timed_by_the_token(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    op_speed.command([f"--workdir={tmp_path}", *TINY, "--directions=step"])
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["implementation"] == "step"
    assert 0 < row["worst_error"] < 1e-5
    assert row["median_ms"] == pytest.approx(1000 / 128)


def test_the_record_names_what_gpu_kernels_are_compiled_with(monkeypatch):
    """Versions of what is installed; of what is not, nothing."""

    def version(name):
        if name != "triton":
            raise timing.metadata.PackageNotFoundError
        return "9.8"

    monkeypatch.setattr(timing.metadata, "version", version)
    assert "triton" not in timing.machine()
    gpu = types.SimpleNamespace(device_kind="GPU", platform="gpu")
    monkeypatch.setattr(timing.jax, "devices", lambda: [gpu, gpu])
    described = timing.machine()
    assert described.startswith("2 x GPU, host with ")
    assert described.endswith(", triton 9.8")
    assert "jax-triton" not in described


def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch, capsys):
    right = timing.delta_product

    def wrong(**arguments):
        o, state = right(**arguments)
        return (o * 1.01, state) if arguments["implementation"] == "chunked" else (o, state)

    monkeypatch.setattr(timing, "delta_product", wrong)
    arguments = [f"--workdir={tmp_path}", *TINY, "--directions=forward"]
    assert flags.run(op_speed.command, arguments) != 0
    assert "error: chunked is wrong at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plain_scan_is_what_ratios_are_to(tmp_path):
    op_speed.command(
        [f"--workdir={tmp_path}", *TINY, "--peer=plain", "--implementations=recurrent"]
    )
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["plain", "recurrent"] * (len(rows) // 2)
    assert {row["times_faster_than_first"] for row in rows[::2]} == {1}
    assert max(row["worst_error"] for row in rows) < 1e-5
    source = Path(inspect.getsourcefile(peer_jax.plain)).read_text()
    assert "deltaproduct_jax" not in source
    assert "experiments" not in source


@pytest.mark.slow
@pytest.mark.parametrize("name", peer_jax.PACKAGES)
def test_a_peer_is_called_in_its_own_way(name, tmp_path, monkeypatch):
    """Stand-ins with the peers' interfaces, made of our own op: layouts, gates and read-outs."""

    def one_factor(query, key, value, beta, decay, *, use_qk_l2norm):
        assert not use_qk_l2norm
        step = (x[:, :, None] for x in (key, value, beta))
        return delta_product(query, *step, decay)

    def many_factors(q, k, v, g, beta, *, num_householder, output_final_state):
        assert output_final_state
        steps = (x.reshape(*q.shape[:2], num_householder, *x.shape[2:]) for x in (k, v, beta))
        return delta_product(q, *steps, g)

    stand_in = types.SimpleNamespace(gated_delta_rule=one_factor, gated_delta_product=many_factors)
    monkeypatch.setitem(sys.modules, peer_jax.MODULES[name], stand_in)
    arguments = [f"--workdir={tmp_path}", *TINY, f"--peer={name}", "--implementations=chunked"]
    op_speed.command([*arguments, "--gated=false"])
    op_speed.command(arguments)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == 2 * ["chunked", name]
    assert max(row["worst_error"] for row in rows) < 1e-5


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--implementations=recurrent,fast", "implementations='fast' is not known"),
        ("--peer=fla", "peer=fla refuses dtype='float32'; give dtype=bfloat16"),
        ("--peer=flashqla", "peer=flashqla refuses dtype='float32'; give dtype=bfloat16"),
        ("--peer=fast", "peer='fast' is not known"),
        ("--peer=jla", "peer=jla needs the package jax-linear-attention"),
        ("--peer=jla --directions=step", "peer='jla' has no directions=step; only fla has"),
        ("--dtype=int8", "dtype='int8' is not known"),
        ("--directions=backward", "directions='backward' is not known"),
        ("--peer=fla --dtype=bfloat16 --directions=step", "peer=fla needs torch"),
        ("--peer=flashqla --dtype=bfloat16 --num_householder=1", "peer=flashqla needs torch"),
        ("--length=0", "length=0 is too small"),
        ("--length=2,3", "length=2,3 must be as many as batch_size=1"),
        ("--num_v_heads=6", "num_v_heads=6 must be a multiple of num_heads=4"),
    ],
)
def test_errors_of_the_speed_benchmark(argument, text, tmp_path, capsys):
    assert flags.run(op_speed.command, [f"--workdir={tmp_path}", *argument.split()]) != 0
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (op_rule.RuleConfig, "states"),
        (op_rule.RuleConfig, "head_dim"),
        (op_speed.SpeedConfig, "num_householder"),
        (op_sharding.ShardingConfig, "num_householder"),
        (EstimateConfig, "num_householder"),
        (PassConfig, "head_dim"),
    ],
)
def test_nothing_to_measure_is_refused(config, name):
    with pytest.raises(ConfigError, match=f"^{name} is empty; give one entry at least"):
        config(**{name: ()})
    with pytest.raises(ConfigError, match=f"^{name}=0 is too small"):
        config(**{name: (2, 0)})


@pytest.mark.slow
@pytest.mark.slow
def test_containment_is_timed_beside_the_op_without_it(tmp_path):
    sizes = ["--length=16", "--num_heads=1", "--head_dim=4", "--num_householder=1", "--repeats=2"]
    op_containment.command([f"--workdir={tmp_path}", *sizes, "--implementations=chunked"])
    rows = json.loads((tmp_path / "containment.json").read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    shape = timing.Shape(1, 16, 1, 4, 4, 1)
    arrays = shape.inputs()
    arrays["v"] = arrays["v"].at[0, 9].set(jnp.nan)
    run = lambda **a: delta_product(**a, implementation="chunked", chunk_size=16)[0]
    assert int(jnp.isnan(run(**arrays)).any(axis=(0, 2, 3)).sum()) == 7
    with op_containment.bare():  # earlier tokens of the chunk too
        assert int(jnp.isnan(run(**arrays)).any(axis=(0, 2, 3)).sum()) == 16
        with pytest.raises(RuntimeError, match="chunked does not keep a NaN where the recurrence"):
            op_containment.check(shape, "chunked")


@pytest.mark.slow
def test_scaling_writes_slopes_and_plot(tmp_path):
    sizes = ["--lengths=32,64,128", "--num_householder=2,1", "--base_length=32", "--repeats=2"]
    op_scaling.command([f"--workdir={tmp_path}", *sizes, "--num_heads=1", "--head_dim=4"])
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["T"] for row in record["by_length"]] == [32, 64, 128]
    assert [row["num_householder"] for row in record["by_num_householder"]] == [1, 2]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    power = [{"x": x, "y": 3 * x**1.5} for x in (1, 2, 5, 9)]
    assert op_scaling.slope(power, "x", "y") == pytest.approx(1.5)


@pytest.mark.parametrize("temp_mib", [None, 0.0])
def test_scaling_of_programs_that_need_no_memory(temp_mib, tmp_path, monkeypatch, capsys):
    """Or whose compiler does not say: what was timed is written all the same."""

    def measure(config, T, R):
        of_long = 2.0 * T if T > 64 else temp_mib
        times = {f"{name}_ms": float(T * R) for name in ("median", "min", "max")}
        return {"T": T, "num_householder": R, **times, "temp_mib": of_long}

    monkeypatch.setattr(op_scaling, "measure", measure)
    op_scaling.command([f"--workdir={tmp_path}", "--lengths=64,128,256", "--base_length=64"])
    slopes = json.loads((tmp_path / "scaling.json").read_text())["slopes"]
    assert slopes["temp_mib over T"] == pytest.approx(1.0)
    assert slopes["temp_mib over num_householder"] is None
    assert slopes["median_ms over num_householder"] == pytest.approx(1.0)
    shown = "-" if temp_mib is None else "0.000"
    assert f"| 64 | 2 | 128 | 128 | 128 | {shown} |" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


SPREAD = ["--length=8", "--num_heads=2", "--head_dim=4", "--repeats=2", "--directions=forward"]


@pytest.mark.slow
def test_the_op_is_spread_along_each_axis_and_beside_one_device(tmp_path, capsys):
    op_sharding.command([f"--workdir={tmp_path}", *SPREAD])
    record = json.loads((tmp_path / "sharding.json").read_text())
    assert [row["axis"] for row in record["rows"]] == ["one device", "batch", "head", "sequence"]
    assert all(0 < row["worst_error"] < 1e-5 for row in record["rows"])
    assert record["rows"][0]["times_faster"] == 1
    assert (tmp_path / "sharding.md").read_text().strip() == capsys.readouterr().out.strip()
    arrays = op_sharding.ShardingConfig(batch_size=4).shape(2).inputs()
    shards = {
        axis: {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
        for axis in op_sharding.AXES
        for placed in [op_sharding.spread(arrays, axis, 2)]
    }
    for axis, name, index in (("batch", "q", 0), ("head", "k", 3), ("sequence", "g", 1)):
        whole = arrays[name].shape
        assert shards[axis][name] == (*whole[:index], whole[index] // 2, *whole[index + 1 :])


def test_what_is_wrong_over_devices_is_not_timed(tmp_path, monkeypatch, capsys):
    right = op_sharding.sharded_delta_product

    def wrong(*arrays, **named):
        o, state = right(*arrays, **named)
        return (o * 1.01, state) if named.get("head_axis") else (o, state)

    monkeypatch.setattr(op_sharding, "sharded_delta_product", wrong)
    assert flags.run(op_sharding.command, [f"--workdir={tmp_path}", *SPREAD]) != 0
    assert "error: head is wrong at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--devices=4096", "devices=4096 are asked for, and there are"),
        ("--batch_size=3", "batch_size=3 must be a multiple of devices=2"),
        ("--axes=time", "axes='time' is not known; it may be one of"),
    ],
)
def test_errors_of_the_sharding_benchmark(argument, text, tmp_path, capsys):
    size = ["--batch_size=4096", "--num_heads=4096", "--length=4096"] * ("devices" in argument)
    assert flags.run(op_sharding.command, [f"--workdir={tmp_path}", *size, argument]) != 0
    assert text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "picked"), [("forward", "recurrent"), ("forward+backward", "chunked")]
)
def test_the_rule_is_held_against_what_was_timed(direction, picked, tmp_path, capsys):
    sizes = ["--states=2,8", "--head_dim=4", "--num_householder=1,2", "--length=160"]
    more = [f"--direction={direction}", "--repeats=2"]
    op_rule.command([f"--workdir={tmp_path}", *sizes, *more])
    assert (tmp_path / "rule.md").read_text().strip() == capsys.readouterr().out.strip()
    rows = json.loads((tmp_path / "rule.json").read_text())["rows"]
    sizes = [(row["B"] * row["Hv"], row["T"], row["R"]) for row in rows]
    assert sizes == [(2, 160, 1), (2, 160, 2), (8, 128, 1), (8, 128, 2)]
    for row in rows:
        times = row["median_ms"]
        assert row["picked"] == picked
        assert row["scan_over_chunked"] == times["recurrent"] / times["chunked"]
        assert row["picked_over_best"] == times[picked] / min(times.values())


def test_the_rule_names_where_it_picked_the_slower():
    row = {"states": 2, "K": 8, "T": 4, "R": 1, "picked": "chunked", "scan_over_chunked": 0.5}
    text = op_rule.table([{**row, "picked_over_best": 2.0}])
    assert "| 2 | 8 | 4 | **0.50** |" in text
    assert text.endswith("K = V = 8, n_h = 1: chunked takes 2.00 times as long as the other")
    assert op_rule.table([{**row, "picked_over_best": 1.04}]).endswith("- nowhere")


def test_convolutions_are_held_against_float64_and_timed(tmp_path, capsys):
    tiny = [f"--workdir={tmp_path}", "--length=9", "--head_dim=4", "--repeats=2", "--packed=true"]
    op_convolution.command([*tiny, "--directions=forward+backward"])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "convolution.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["plain", "fused"]
    for row in rows:
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert 0 < row["worst_error"] < 1e-6
        assert row["device_ms"] is None
        assert f"| {row['direction']} | {row['implementation']} |" in printed


@pytest.mark.slow
def test_gradients_of_convolutions_have_the_names_of_a_peers():
    sizes = op_convolution.ConvolutionConfig().sizes()
    run = bench_convolution.layer_program(sizes, "plain", "forward+backward")
    outputs, gradients = jax.eval_shape(run, jax.eval_shape(sizes.inputs))
    assert set(outputs) == set("qkv")
    assert set(gradients) == {*"qkv", *(f"{name}_taps" for name in "qkv")}


def test_a_wrong_convolution_is_not_timed(tmp_path, monkeypatch):
    right = bench_convolution.exact
    doubled = lambda *arguments: jax.tree.map(lambda x: 2 * x, right(*arguments))
    monkeypatch.setattr(bench_convolution, "exact", doubled)
    with pytest.raises(ConfigError, match="plain is wrong at Convolutions"):
        op_convolution.command(
            [
                f"--workdir={tmp_path}",
                "--length=9",
                "--directions=forward",
                "--implementations=plain",
            ]
        )


def test_convolutions_by_a_kernel_say_why_they_cannot_be_timed(tmp_path):
    with pytest.raises(ConfigError, match="implementations=triton: conv_implementation='triton'"):
        op_convolution.command(
            [f"--workdir={tmp_path}", "--implementations=triton", "--conv_size=5"]
        )
    for given, text in (
        (["--directions=step"], "directions='step' is not known"),
        (["--preset=gpu", "--estimate=v5e"], "implementations='triton' is not known; it may be"),
        (["--preset=tpu", "--num_heads=3", "--head_dim=32"], "there are 96 channels; it takes mul"),
    ):
        with pytest.raises(ConfigError, match=text):
            op_convolution.command([f"--workdir={tmp_path}", *given])
