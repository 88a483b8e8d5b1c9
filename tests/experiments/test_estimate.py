"""Estimates for TPUs: how the compiler's text is read, how its deaths are borne, what is written.

No compiler is needed here; test_tpu_compile.py has one.
"""

import contextlib
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.compilers import child, hlo_cost
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops import delta_product
from experiments.hardware import tpu_estimate
from experiments.lib import compilers, flags
from experiments.lib.bench import tpu_compiler
from experiments.lib.bench.peers import tokamax
from experiments.lib.bench.timing import FORWARD, Shape
from experiments.lib.bench.tpu_compiler import Compilation

# Two loops, one in the other: 10 passes, whose bound the compiler has hoisted and whose comparison
# it has fused, and in each of them (8 - 2) / 3 = 2. COST is what the compiler says of a line.
TEXT = """HloModule jit_f, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}

%fused_compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.9 = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%below_8 (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %eight = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %eight), direction=LT
}

%inverts (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %three = s32[] constant(3)
  %next = s32[] add(%i.1, %three), COST 0 -
  %x.1 = f32[8] get-tuple-element(%p.1), index=1
  %inverse = f32[8] custom-call(%x.1), custom_call_target="Invert", COST 0 7
  ROOT %t.1 = (s32[], f32[8]) tuple(%next, %inverse)
}

%below_n (q: (s32[], s32[], f32[8])) -> pred[] {
  %q = (s32[], s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] get-tuple-element(%q), index=1
  ROOT %compare_fusion = pred[] fusion(%j, %n), kind=kLoop, calls=%fused_compare
}

%loops (q.1: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %q.1 = (s32[], s32[], f32[8]) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %one = s32[] constant(1)
  %j.2 = s32[] add(%j.1, %one)
  %n.1 = s32[] get-tuple-element(%q.1), index=1
  %x.2 = f32[8] get-tuple-element(%q.1), index=2
  %two = s32[] constant(2)
  %start = s32[] copy(%two)
  %t.2 = (s32[], f32[8]) tuple(%start, %x.2)
  %inner = (s32[], f32[8]) while(%t.2), condition=%below_8, body=%inverts
  %y = f32[8] get-tuple-element(%inner), index=1
  %sum = f32[8] all-reduce-start(%y), channel_id=1, COST 100 30
  ROOT %t.3 = (s32[], s32[], f32[8]) tuple(%j.2, %n.1, %sum)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %ten = s32[] constant(10)
  %t = (s32[], s32[], f32[8]) tuple(%zero, %ten, %x)
  %outer = (s32[], s32[], f32[8]) while(%t), condition=%below_n, body=%loops
  %z = f32[8] get-tuple-element(%outer), index=2
  ROOT %copy = f32[8] copy(%z), COST 1000 500
}
"""


def with_costs(text):
    """Writes the model's and the schedule's cycles as the compiler does; - for none."""

    def config(match):
        fields = {"flag_configs": [], "window_config": {"estimated_cycles": match[1], "x": [{}]}}
        if match[2] != "-":
            fields["bundle_analysis_data"] = {"estimated_cycles": match[2], "flops": "0"}
        return "backend_config=" + json.dumps(fields, separators=(",", ":"))

    return re.sub(r"COST (\d+) (\d+|-)", config, text)


def test_cycles_are_multiplied_by_the_trips_of_loops():
    found = hlo_cost.cost(with_costs(TEXT))
    assert found.loops == {"outer": 10, "inner": 2}
    assert found.model_cycles == 1000 + 10 * 100
    assert found.schedule_cycles == 500 + 10 * (30 + 2 * 7)
    assert found.custom_calls == {"Invert": 20}
    assert found.collectives == {"all-reduce": 10}


def test_without_a_profile_there_are_no_cycles_of_the_schedule():
    found = hlo_cost.cost(with_costs(re.sub(r"COST (\d+) \d+", r"COST \1 -", TEXT)))
    assert found.schedule_cycles is None
    assert found.model_cycles == 2000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tuple(%zero, %ten, %x)", "tuple(%x, %ten, %x)"),
        ("tuple(%zero, %ten, %x)", "tuple(%zero, %x, %x)"),
        ("compare(%a, %b), direction=LT", "compare(%a, %b), direction=NE"),
        ("add(%j.1, %one)", "multiply(%j.1, %one)"),
    ],
)
def test_a_loop_that_cannot_be_counted_is_no_loop_of_one_pass(old, new):
    assert old in TEXT
    with pytest.raises(ValueError, match="trip count of a loop is not to be seen"):
        hlo_cost.cost(with_costs(TEXT.replace(old, new)))


WANTED = [Compilation("v5e", "chunked", FORWARD, Shape(1, 4, 1, 2, 2, 2))] * 3


@pytest.mark.parametrize(
    ("body", "profile", "ending"),
    [
        ("print('{\"a\": 1}\\n{\"a\"', end='', flush=True); os.abort()", True, "profiler aborted"),
        ("print('{\"a\": 1}', flush=True); os.abort()", False, "compiler aborted"),
        ("print('{\"a\": 1}', flush=True); time.sleep(60)", True, "timed out"),
    ],
)
def test_what_was_compiled_before_the_child_died_is_kept(body, profile, ending, monkeypatch):
    monkeypatch.setattr(compilers, "compiler_version", lambda platform: "1")
    program = f"import json, os, sys, time; json.load(sys.stdin); {body}"
    monkeypatch.setattr(child, "COMMAND", [sys.executable, "-c", program])
    found = tpu_compiler.compile_apart(WANTED, profile=profile, timeout_s=4)
    assert found == [{"a": 1}, {"error": ending}, {"error": ending}]


def test_a_mistake_of_ours_in_the_child_is_no_abort(monkeypatch):
    monkeypatch.setattr(compilers, "compiler_version", lambda platform: "1")
    monkeypatch.setattr(child, "COMMAND", [sys.executable, "-c", "raise KeyError('here')"])
    with pytest.raises(RuntimeError, match="KeyError: 'here'"):
        tpu_compiler.compile_apart(WANTED, profile=True, timeout_s=20)


@pytest.mark.parametrize("R", [1, 3])
def test_the_interleaved_form_is_the_same_op(R):
    arrays = Shape(B=2, T=5, H=2, K=4, V=3, R=R).inputs()
    got = tpu_compiler.interleaved(**arrays, chunk_size=2)
    want = tpu_compiler.IMPLEMENTATIONS["scan"](**arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("R", [1, 3])
def test_a_peer_is_called_in_its_own_way(R, gated, monkeypatch):
    """A stand-in with the peer's interface, made of our own op: heads first, gates by channel."""

    def kimi_delta_attention(query, key, value, gate, beta, *, output_final_state, implementation):
        assert (output_final_state, implementation, switches) == (True, "mosaic", [True])
        q, k, v, g, beta = (jnp.moveaxis(x, 0, 2) for x in (query, key, value, gate, beta))
        assert g.shape == q.shape
        np.testing.assert_array_equal(g, np.broadcast_to(g[..., :1], g.shape))
        o, state = delta_product(q, *(x[:, :, None] for x in (k, v, beta)), g[..., 0])
        return jnp.moveaxis(o, 2, 0), state[:, None]

    @contextlib.contextmanager
    def cross_compile(value):
        switches.append(value)
        yield
        switches.clear()

    switches = []
    package = types.ModuleType("tokamax")
    package.config = types.SimpleNamespace(cross_compile=cross_compile)
    api = types.SimpleNamespace(kimi_delta_attention=kimi_delta_attention)
    for name, module in (("", package), (".config", package.config), ("._src.ops.kda.api", api)):
        monkeypatch.setitem(sys.modules, "tokamax" + name, module)
    for name in ("._src", "._src.ops", "._src.ops.kda"):
        monkeypatch.setitem(sys.modules, "tokamax" + name, types.ModuleType("tokamax" + name))
    monkeypatch.setattr(tokamax, "require", lambda: "tokamax 1")
    arrays = Shape(B=2, T=5, H=2, K=4, V=3, R=R, gated=gated).inputs()
    got = tpu_compiler.IMPLEMENTATIONS["tokamax"](**arrays)
    want = tpu_compiler.IMPLEMENTATIONS["scan"](**arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


def test_the_program_of_a_gradient_gives_one_for_every_input():
    shape = Shape(B=1, T=4, H=1, K=2, V=3, R=2, dtype="bfloat16")
    function, (arrays, cotangents) = tpu_compiler.function_and_arguments(
        Compilation("v5e", "chunked", "forward+backward", shape)
    )
    outputs, (gradients,) = jax.eval_shape(function, arrays, cotangents)
    assert set(gradients) == {"q", "k", "v", "beta", "g"}
    assert gradients == arrays
    assert outputs == cotangents


def figures(wanted, profile):
    if wanted.implementation == "interleaved" and profile:
        return {"error": "profiler aborted"}
    if wanted.implementation == "scan":
        return {"error": "RESOURCE_EXHAUSTED: too large"}
    factor = 2 if wanted.implementation == "interleaved" else 1
    return {
        "schedule_cycles": 3000 * factor if profile else None,
        "kernel_cycles": 1500 if wanted.implementation == "tokamax" else None,
        "model_cycles": 6000 * factor,
        "hbm_bytes": 8 << 20,
        "custom_calls": {"AllocateBuffer": 2, "Invert": 20},
        "collectives": {},
        "loops": {},
        "temp_bytes": 3 << 20,
        "argument_bytes": 2 << 20,
        "output_bytes": 1 << 20,
    }


def test_the_table_says_where_the_profiler_aborted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tpu_estimate, "require_compiler", lambda platform: None)
    monkeypatch.setattr(tpu_estimate, "versions", lambda platform: "jax 1, libtpu 2")
    monkeypatch.setattr(
        tpu_estimate,
        "compile_apart",
        lambda wanted, profile, timeout_s: [figures(each, profile) for each in wanted],
    )
    monkeypatch.setattr(tokamax, "require", lambda: "tokamax 3")
    argv = [f"--workdir={tmp_path}", "--num_householder=2", "--generations=v5e", "--peer=tokamax"]
    tpu_estimate.command(argv)
    text = (tmp_path / "estimate.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    memory = "3.0 | 2.0 | 1.0 | 20 Invert |"
    name = "| v5e | 2 | forward | "
    # 2 MiB of arguments, 1 of outputs, 4 of states, one for every 64 tokens.
    traffic = "8.0 | 1.14"
    assert f"{name}interleaved | profiler aborted | - | 8.0 | 1.00 | {traffic} | {memory}" in text
    assert f"{name}chunked | 2.0 | - | 4.0 | 0.50 | {traffic} | {memory}" in text
    assert f"{name}tokamax | 2.0 | 1.0 | 4.0 | 0.50 |" in text
    assert f"{name}scan | RESOURCE_EXHAUSTED: too large | " in text
    assert "jax 1, libtpu 2, tokamax 3" in text
    record = json.loads((tmp_path / "estimate.json").read_text())
    assert record["command"] == " ".join(["python -m experiments.hardware.tpu_estimate", *argv])
    assert record["hertz"] == {"v5e": 1.5e9}
    assert len(record["rows"]) == 2 * 4


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--generations=v5e,v3", "generations='v3' is not known"),
        ("--implementations=fast", "implementations='fast' is not known"),
        ("--directions=backward", "directions='backward' is not known"),
        ("--dtype=float64", "dtype='float64' is not known"),
        ("--chunk_size=0", "chunk_size=0 is too small"),
        ("--peer=torch", "peer='torch' is not known"),
        ("--implementations=tokamax", "implementations='tokamax' is not known"),
        (
            "--peer=tokamax",
            "peer=tokamax needs package tokamax, which is not installed: pip install",
        ),
        ("--length=8", "package libtpu, which holds the compiler for TPUs, is not installed"),
    ],
)
def test_errors_of_the_estimate(argument, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compilers, "compiler_version", lambda platform: None)
    assert flags.run(tpu_estimate.command, [f"--workdir={tmp_path}", argument]) != 0
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_compiler_is_found_in_the_folder_of_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(compilers.environment, "extra_folder", lambda extra: tmp_path / extra)
    assert compilers.compiler_version("tpu") is None
    information = tmp_path / "tpu" / "libtpu-1.2.dist-info" / "METADATA"
    information.parent.mkdir(parents=True)
    information.write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 1.2\n")
    assert compilers.compiler_version("tpu") == "1.2"
    assert compilers.compiler_version("cuda") is None


def test_the_missing_compiler_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(compilers, "compiler_version", lambda platform: None)
    with pytest.raises(ConfigError, match=r"pip install libtpu==\d+\.\d+\.\d+"):
        tpu_compiler.compile_apart([], profile=False, timeout_s=1)
