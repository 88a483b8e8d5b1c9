"""Flags from dataclasses: types, precedence, help, and one line for whatever cannot be honoured."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.settings import setting
from deltaproduct_jax.training import stopping
from deltaproduct_jax.training.config import TrainConfig
from experiments import state_tracking, theory
from experiments.analysis import theory_limits
from experiments.hardware import gpu_check, gpu_launches
from experiments.lib import flags
from experiments.op import rule, scaling, sharding, speed


def _field(default, text="a field"):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Cake:
    layers: int = _field(2)
    sugar: float = _field(0.5)
    name: str = _field("plain")
    glazed: bool = _field(False)
    cherries: int | None = _field(None)
    cuts: tuple[int, ...] = _field(())
    guests: tuple[int, ...] | None = _field(None)
    secret: int = _field(7)


@dataclasses.dataclass(frozen=True)
class Oven:
    degrees: float | None = _field(None)


SECTIONS = {"cake": Cake, "oven": Oven}
PRESETS = {"default": {"layers": 3}, "feast": {"layers": 9, "cuts": (4, 8), "degrees": 180.0}}


def parse(*argv):
    return flags.parse(["--workdir=w", *argv], SECTIONS, PRESETS, exclude=["secret"]).sections


def cake(*argv):
    return parse(*argv)["cake"]


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--layers=5", "layers", 5),
        ("--sugar=1", "sugar", 1.0),
        ("--sugar=1e-3", "sugar", 1e-3),
        ("--name=none", "name", "none"),
        ("--glazed", "glazed", True),
        ("--glazed=true", "glazed", True),
        ("--noglazed", "glazed", False),
        ("--cherries=3", "cherries", 3),
        ("--cherries=none", "cherries", None),
        ("--cuts=4,8,16", "cuts", (4, 8, 16)),
        ("--cuts=4", "cuts", (4,)),
        ("--cuts=", "cuts", ()),
        ("--guests=None", "guests", None),
        ("--guests=1,2", "guests", (1, 2)),
    ],
)
def test_types(argument, name, value):
    got = cake(argument)[name]
    assert got == value
    assert type(got) is type(value)


def test_the_flag_wins_over_the_preset_and_the_preset_over_the_field():
    assert cake() == {"layers": 3}
    assert parse("--preset=feast") == {
        "cake": {"layers": 9, "cuts": (4, 8)},
        "oven": {"degrees": 180.0},
    }
    assert cake("--layers=1", "--preset=feast") == {"layers": 1, "cuts": (4, 8)}
    # A flag that is given wins although its value is the field's default.
    assert cake("--preset=feast", "--layers=2")["layers"] == 2


def test_a_repeated_flag_gathers_its_entries():
    @dataclasses.dataclass(frozen=True)
    class Shop:
        list: tuple[str, ...] = setting((), "what to buy", repeated=True)

    def bought(*argv):
        return flags.parse(["--workdir=w", *argv], {"shop": Shop}, {"default": {}}).sections["shop"]

    assert bought() == {}
    assert bought("--list=a,b", "--list=c=d;e") == {"list": ("a,b", "c=d;e")}


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        (theory.TheoryConfig, {"seed": -1}, "seed=-1 is too small; it must be at least 0"),
        (theory.TheoryConfig, {"seed": 2**63}, "seed=9223372036854775808 is too large; it may be"),
        (theory_limits.LimitsConfig, {"seed": 10**5000}, "seed=(a number of thousands of digits)"),
        (TrainConfig, {"seed": 2**64}, "seed=18446744073709551616 is too large; it may be up to"),
        (speed.SpeedConfig, {"budget_s": -3.0}, "budget_s=-3.0 must be greater than 0"),
        (scaling.ScalingConfig, {"budget_s": 0.0}, "budget_s=0.0 must be greater than 0"),
        (sharding.ShardingConfig, {"axes": ()}, "axes is empty; give one entry at least (what is"),
        (gpu_launches.LaunchesConfig, {"kernels": ()}, "kernels is empty; give one entry at"),
        (gpu_check.CheckConfig, {"cases": ("all",)}, "cases='all' is not known; it may be one of"),
        (rule.RuleConfig, {"direction": "back"}, "direction='back' is not known; it may be one of"),
        (gpu_check.CheckConfig, {"peer": "fla"}, "peer='fla' is not known; it may be one of"),
    ],
)
def test_bounds_of_settings(config, values, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_a_saved_config_is_given_again(tmp_path):
    path = tmp_path / "config.json"
    saved = {"cake": {"layers": 4, "cuts": [1, 2], "guests": None, "secret": 3, "sugar": 1}}
    path.write_text(json.dumps(saved))
    assert parse(f"--config={path}", "--layers=5") == {
        "cake": {"layers": 5, "cuts": (1, 2), "guests": None, "sugar": 1.0},
        "oven": {},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", r"\[1\] must be an object .*; it must hold cake, oven"),
        ('{"cake": 3}', "cake=3 must be an object of keys and values; it must hold cake, oven"),
        ('{"cake": {"sugar": NaN}}', "NaN is no number of JSON"),
        ('{"cake": {"sugar": Infinity}}', "Infinity is no number of JSON"),
        ('{"cake": {"sugar": -1e400}}', "-1e400 is larger than any float"),
        ('{"cake": ' + "[" * 100_000, "is nested too deeply"),
        ('{"bread": {}}', "'bread' is no section; it may be one of cake, oven"),
        (
            '{"cake": {"layer": 1}}',
            "'layer' is no field of section 'cake'; it may be one of lay",
        ),
        ('{"cake": {"layers": "2"}}', "layers='2' must be a whole number"),
        ('{"cake": {"layers": true}}', "layers=True must be a whole number"),
        ('{"cake": {"layers": 2.5}}', r"layers=2\.5 must be a whole number"),
        ('{"cake": {"glazed": 1}}', "glazed=1 must be true or false"),
        ('{"cake": {"cuts": [1.5]}}', r"cuts\[0\]=1\.5 must be a whole number"),
        ('{"cake": {"name": null}}', "name=None must be a text"),
    ],
)
def test_a_bad_config_is_explained(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        parse(f"--config={path}")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--layers=two", "flag --layers=two: it must be a whole number$"),
        ("--layers=2.5", "flag --layers=2.5: it must be a whole number$"),
        ("--layers=", "flag --layers=: it must be a whole number$"),
        ("--layers", "Missing value for flag --layers"),
        ("--sugar=much", "flag --sugar=much: it must be a finite number$"),
        ("--glazed=maybe", "flag --glazed=maybe: it must be true or false$"),
        ("--help=x", "flag --help=x: it must be true or false$"),
        ("--cherries=some", "flag --cherries=some: it must be a whole number or none$"),
        ("--cuts=4,,8", "flag --cuts=4,,8: it must be whole numbers such as 4,8,16$"),
        ("--cuts=none", "flag --cuts=none: it must be whole numbers such as 4,8,16$"),
        ("--guests=a", "flag --guests=a: it must be whole numbers such as 4,8,16 or none$"),
        ("--preset=lunch", "flag --preset=lunch: .*default.feast"),
        ("--layer=2", "Unknown command line flag 'layer'. Did you mean: layers"),
        ("--secret=2", "Unknown command line flag 'secret'"),
    ],
)
def test_a_bad_flag_is_explained(argument, message):
    with pytest.raises(absl_flags.Error, match=message):
        parse(argument)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir="], "--workdir is missing"),
        (["--workdir=w", "--undefok=lerning_rate", "--lerning_rate=1"], "flag 'undefok'"),
        (["--workdir=w", "--flagfile", "flags.txt"], "flag 'flagfile'"),
        (["--workdir=w", "--config="], "--config='' is empty; it may be a path"),
        (["--workdir=w", "runs"], "argument 'runs' is no flag; a flag is written --name=value"),
        (["--workdir=w", "--preset=feast", "--config=c"], "exclude each other"),
        (["--workdir=w", "--config=absent.json"], "absent.json cannot be read: No such file"),
    ],
)
def test_a_bad_command_line_is_explained(argv, message):
    with pytest.raises(ConfigError, match=message):
        flags.parse(argv, SECTIONS, PRESETS)


def test_two_fields_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="'layers' of section 'again' is a flag already, of cake"):
        flags.parse([], {"cake": Cake, "again": Cake}, PRESETS)


def test_help_shows_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        flags.parse(["--help"], SECTIONS, PRESETS, exclude=["secret"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for name in ("layers", "sugar", "cuts", "degrees", "workdir", "preset", "config"):
        assert f"--{name}" in shown
    assert "--layers: a field (default 3)" in shown  # what the default preset gives
    assert "secret" not in shown
    assert shown.startswith("--workdir=DIRECTORY is needed. ")
    with pytest.raises(SystemExit):
        flags.parse(["--help"], SECTIONS, PRESETS, default_workdir="runs/one")
    assert capsys.readouterr().out.startswith("--workdir=DIRECTORY is runs/one if not given. ")


@pytest.mark.parametrize("error", [ConfigError("bad\n  field"), RunDirectoryError("bad\n  field")])
def test_errors_of_the_user_become_one_line(error, capsys):
    def command(argv):
        raise error

    assert flags.run(command, []) == 2
    assert capsys.readouterr().err == "error: bad field\n"


def test_memory_that_is_short_is_one_line(capsys):
    def command(argv):
        np.empty(2**60, np.int32)

    assert flags.run(command, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory is short: Unable to allocate 4.00 EiB")


@pytest.mark.parametrize(("name", "output"), [("out", "output"), ("err", "error")])
def test_a_full_disk_under_the_output_is_one_line(name, output, capsys, monkeypatch):
    """What is printed is less than a buffer, or more than one."""
    for size in (1, 100_000):
        with open("/dev/full", "w", buffering=1 if name == "err" else -1) as full:
            monkeypatch.setattr(sys, f"std{name}", full)
            prints = lambda argv: print("x" * argv[0], file=getattr(sys, f"std{name}"))
            assert flags.run(prints, [size]) == 2
            monkeypatch.undo()
    says = f"error: standard {output} cannot be written: No space left on device\n"
    captured = capsys.readouterr()
    assert captured.err == (2 * says if name == "out" else "")
    assert not captured.out.strip()


def test_a_reader_that_has_seen_enough_ends_a_command(capsys, monkeypatch):
    for size in (1, 100_000):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            code = flags.run(lambda argv: print("x" * argv[0]), [size])
            assert code == 128 + signal.SIGPIPE
            monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [BrokenPipeError("of another"), OSError(28, "No space left"), OSError("text alone")]
)
def test_an_output_that_can_be_written_hides_no_error_and_gets_no_line(error, capsys):
    def command(argv):
        raise error

    with pytest.raises(OSError, match=error.args[-1]):
        flags.run(command, [])
    assert capsys.readouterr() == ("", "")


def test_letters_that_an_output_lacks_are_spelt(monkeypatch):
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="ascii"))
    assert flags.run(lambda argv: print("größe λ"), []) == 0
    assert kept.getvalue() == b"gr\\xf6\\xdfe \\u03bb\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_command_runs_with_an_output_closed(name, monkeypatch):
    """Python then has None in the place of a stream."""
    monkeypatch.setattr(sys, name, None)

    def command(argv):
        print("seen by nobody", file=getattr(sys, name), flush=True)
        raise ConfigError("bad field")

    assert flags.run(command, []) == 2


def test_a_signal_as_a_command_begins_is_one_line(capsys, monkeypatch):
    """It comes when it is heard already, and the command's first line not reached."""

    @contextlib.contextmanager
    def heard(handler, watch):
        handler(signal.SIGTERM, None)
        yield

    registered = []
    monkeypatch.setattr(flags.atexit, "register", lambda *given: registered.append(given))
    monkeypatch.setattr(stopping, "_heard", heard)
    assert flags.run(lambda argv: None, []) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command begins anew\n"
    assert registered == [(flags.outputs.end_at_once, 143)]


def test_a_seed_stands_for_the_same_numbers_whatever_the_modes_of_jax():
    drawn = []
    draw = lambda argv: drawn.append(jax.random.uniform(jax.random.key(3)))
    for mode in (jax.threefry_partitionable(False), jax.default_prng_impl("rbg")):
        with mode:
            assert flags.run(draw, []) == 0
    assert drawn == [jax.random.uniform(jax.random.key(3))] * 2


def test_other_errors_keep_their_traceback():
    def command(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        flags.run(command, [])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workdir=file", "workdir=file cannot be a directory: Not a directory"),
        ("--workdir=file/run", "workdir=file/run cannot be a directory: Not a directory"),
        (f"--workdir={'x' * 300}", "cannot be a directory: File name too long"),
        (f"--workdir={'x/' * 2100}", "cannot be a directory: File name too long"),
        ("--workdir=a\0b", r"argument '--workdir=a\\x00b' must be UTF-8 without a NUL"),
        ("--name=\udcff", r"argument '--name=\\udcff' must be UTF-8 without a NUL"),
        ("--workdir=~nobody-of-this-name/x", "begins with a home that is not known"),
        ("--workdir=gs://bucket/run", "gs://bucket/run is in a bucket, which has no locks"),
        ("--config=gs://bucket/run", "--config='gs://bucket/run' is an address; it may be a path"),
        ("--config=.", r"--config=\. cannot be read: Is a directory"),
    ],
)
def test_paths_and_texts_that_cannot_be_are_explained(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ConfigError, RunDirectoryError), match=message):
        parse(argument)


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "saved.json").write_text('{"cake": {"layers": 4}}')
    parsed = flags.parse(["--workdir=~/run", "--config=~/saved.json"], SECTIONS, PRESETS)
    assert parsed.workdir == tmp_path / "run"
    assert parsed.sections["cake"] == {"layers": 4}


def test_a_vocabulary_that_is_not_the_tasks_is_refused(tmp_path, capsys):
    saved = {"task": {"group": "S3"}, "model": {"vocab_size": 14}}
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    argv = [f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'saved.json'}"]
    assert state_tracking.main(argv) == 2
    assert "--config: vocab_size=14 must be the task's, 13" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_a_command_writes_is_looked_at_before_its_work(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"/proc/x cannot be written: No such file"):
        parse("--workdir=/proc/x")
    parse(f"--workdir={tmp_path / 'new'}")
    assert not list(tmp_path.iterdir())
