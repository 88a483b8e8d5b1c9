"""Programs compile side by side, once, and one that cannot be made is an error of its own."""

import threading

import jax
import jax.numpy as jnp
import pytest
from tiny_run import run_config

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training import compiled
from deltaproduct_jax.training.progress import Stopwatch


def powers(stopwatch):
    return compiled.CompiledByLength(lambda length, x: x**length, "a power", "x=3", stopwatch)


def test_programs_compile_side_by_side_and_once(monkeypatch):
    make, both, made = compiled.within_memory, threading.Barrier(2, timeout=60), []

    def make_with_another(lowered, what):
        both.wait()  # for ever, if one came after the other
        made.append(what)
        return make(lowered, what)

    monkeypatch.setattr(compiled, "within_memory", make_with_another)
    monkeypatch.setattr(compiled, "compiled_at_once", lambda: 2)
    power, x = powers(watch := Stopwatch()), jnp.float32(3)
    wanted = [compiled.Wanted(power, length, (x,)) for length in (2, 3, 2)]
    compiled.prepare(wanted, watch)
    compiled.prepare(wanted, watch)
    assert sorted(made) == [f"a power, sequences of {n} tokens, x=3" for n in (2, 3)]
    assert [float(power(length, x)) for length in (2, 3)] == [9, 27]
    assert len(made) == 2


def test_without_jit_a_function_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(compiled, "within_memory", None)
    power, seen = powers(watch := Stopwatch()), []
    power._function = lambda length, x: seen.append(float(x)) or x**length  # no tracer
    with jax.disable_jit():
        compiled.prepare([compiled.Wanted(power, 2, (jnp.float32(3),))], watch)
        assert power(2, jnp.float32(3)) == 9
    assert seen == [3]
    assert not power.has(2)


def test_a_single_process_with_an_accelerator_compiles_as_many_as_it_has_cores(monkeypatch):
    monkeypatch.setattr(compiled, "cores", lambda: 7)
    for platform, processes, wanted in (("cpu", 1, 1), ("gpu", 1, 7), ("tpu", 4, 1)):
        monkeypatch.setattr(compiled.jax, "default_backend", lambda platform=platform: platform)
        monkeypatch.setattr(compiled.jax, "process_count", lambda count=processes: count)
        assert compiled.compiled_at_once() == wanted


def test_a_program_that_does_not_fit_is_named(monkeypatch):
    def make(lowered, what):
        raise ConfigError(f"{what}, needs more")

    monkeypatch.setattr(compiled, "within_memory", make)
    power = powers(watch := Stopwatch())
    wanted = [compiled.Wanted(power, length, (jnp.float32(3),)) for length in (2, 3)]
    with pytest.raises(ConfigError, match=r"^a power, sequences of 2 tokens, x=3, needs more"):
        compiled.prepare(wanted, watch)
    assert not any(map(power.has, (2, 3)))


def test_what_is_ahead_of_a_step():
    config = run_config(
        train_length=4, curriculum=(2, 3), curriculum_fraction=0.5, steps=12, eval_lengths=(4, 7),
        select_length=5,
    )  # fmt: skip
    power, asked = powers(Stopwatch()), []

    class Source:
        def evaluation(self, split, length):
            asked.append(split)
            return iter([length])

    lengths = lambda wanted: [each.length for each in wanted]
    for step, ahead in ((0, [2, 3, 4]), (4, [3, 4]), (11, [4]), (12, [])):
        assert lengths(compiled.trained_after(step, config, power, ())) == ahead
    evaluated = compiled.evaluated_with(config, Source(), power, lambda given: (given,))
    assert lengths(evaluated) == [5, 4, 7]
    assert [each.arrays for each in evaluated] == [(5,), (4,), (7,)]
    assert asked == ["valid", "test", "test"]
    tested = compiled.evaluated_with(config, Source(), power, lambda given: (given,), ("test",))
    assert lengths(tested) == [4, 7]
