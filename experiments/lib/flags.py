"""Flags generated from the fields of config dataclasses: no flag without a field, none idle.

A value is taken from, in this order: the flag on the command line, the file given by ``--config``,
the preset, the dataclass. Plug-ins are imported before flags are made, so that what they register
has flags too. What cannot be honoured ends the command with one line on standard error.
"""

import atexit
import dataclasses
import logging
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from deltaproduct_jax import files
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.parallel import processes
from deltaproduct_jax.settings import misfit
from deltaproduct_jax.training.measuring.memory import first_line, is_exhausted
from deltaproduct_jax.training.plugins import PluginConfig, import_plugins
from deltaproduct_jax.training.records import ConfigFile
from deltaproduct_jax.training.stopping import (
    Stopped,
    StopRequest,
    exit_code,
    interrupted_by_signals,
    was_asked,
)
from experiments import leave_no_more
from experiments.lib import outputs
from experiments.lib.field_flags import (
    Boolean,
    FieldParser,
    OptionalBoolean,
    options_of,
    show,
    value_of,
)
from experiments.lib.parent import end_with_parent

Sections = Mapping[str, type]  # section of config.json -> dataclass
Presets = Mapping[str, Mapping[str, Any]]  # preset -> field -> value
Command = Callable[[Sequence[str]], None]
USAGE_ERROR = 2
# Flags that absl has itself: of a file of flags, and of what shall be passed over without a word.
OF_ABSL = ("flagfile", "undefok")
COMMON = ("workdir", "preset", "config", "help")  # flags of every command


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command line understood: values of the fields by section, and where to run."""

    sections: dict[str, dict[str, Any]]
    workdir: Path
    # What the file of --config says, also of fields that have no flag; empty without one.
    saved: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    preset: str | None = None  # as the flag has it


def parse(
    argv: Sequence[str],
    sections: Sections,
    presets: Presets,
    *,
    exclude: Iterable[str] = (),
    default_workdir: str | None = None,
    writes: bool = True,
) -> Parsed:
    """Understands a command line.

    A dataclass may stand for several: its class method ``variant(values)`` then returns the one
    whose fields are flags beside these values, which are as written, as saved, or the preset's.
    A preset gives way where a dataclass says, by a class method ``without_use(values)``, that a
    field means nothing beside the other values; a flag of that name is for the dataclass to refuse.

    Args:
        argv: the arguments, without the program's name.
        sections: the dataclasses whose fields become flags, each by its section of config.json.
        presets: fields that a preset sets; the one called "default" is used where none is named.
        exclude: fields that get no flag, because the experiment sets them.
        default_workdir: where to run if no flag says so; without it --workdir must be given.
        writes: whether the command always writes there, so that a place where it cannot is refused
            now, not after the work.

    Raises:
        ConfigError, flags.Error: naming the flag or key, what it got and what it may be.
        SystemExit: after ``--help``.
    """
    _check_text(argv)
    sections = chosen(argv, sections, presets)
    values = flags.FlagValues()
    fields = _define(values, sections, set(exclude))
    flags.DEFINE_string("workdir", None, "the run directory", flag_values=values)
    one_of = f"one of {', '.join(presets)}"
    flags.DEFINE_enum("preset", None, list(presets), one_of, flag_values=values)
    flags.DEFINE_string("config", None, "a saved config.json to run again", flag_values=values)
    _define_help(values)
    _read(values, argv)
    if values.help:
        print(_help(values, sections, presets, default_workdir), flush=True)
        raise SystemExit(0)
    workdir = default_workdir if values.workdir is None else values.workdir
    if not workdir:  # empty as of a variable that is not set
        raise ConfigError("--workdir is missing; give the directory that the run is to live in")
    saved = {} if values.config is None else _read_config(values.config, sections)
    resolved = _resolve(values, sections, fields, presets, set(exclude), saved)
    files.require_directory(Path(workdir), "workdir")
    path = files.user_path(workdir, "workdir")
    (files.require_writable if writes else files.require_directory)(path, "workdir")
    return Parsed(resolved, path, saved, values.preset)


def parse_fields(argv: Sequence[str], sections: Sections) -> dict[str, dict[str, Any]]:
    """Understands the command line of a command that writes no files: fields alone, by section.

    Raises:
        ConfigError, flags.Error: naming the flag, what it got and what it may be.
        SystemExit: after ``--help``.
    """
    _check_text(argv)
    values = flags.FlagValues()
    owner = _define(values, sections, set())
    _define_help(values)
    _read(values, argv)
    if values.help:
        print("\n".join(_help_of_fields(values, sections, {})), flush=True)
        raise SystemExit(0)
    found: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for name, section in owner.items():
        if values[name].present:
            value = values[name].value
            found[section][name] = tuple(value) if isinstance(value, list) else value
    return found


def _read(values: flags.FlagValues, argv: Sequence[str]) -> None:
    rest = values(["", *argv], known_only=False)[1:]
    if rest:
        raise ConfigError(f"argument {rest[0]!r} is no flag; a flag is written --name=value")


def _check_text(argv: Sequence[str]) -> None:
    for argument in argv:
        if "\0" in argument or argument.encode(errors="ignore").decode() != argument:
            raise ConfigError(f"argument {argument!a} must be UTF-8 without a NUL character")
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name in OF_ABSL:
            raise ConfigError(f"Unknown command line flag {name!r}")


def chosen(argv: Sequence[str], sections: Sections, presets: Presets) -> dict[str, type]:
    """The sections that a command line means, after its plug-ins have been imported.

    Raises:
        ConfigError: a plug-in or the file of ``--config`` cannot be read, a variant is unknown, or
            a file and a preset are given.
    """
    given: dict[str, Any] = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, text = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            given[name] = text if equals else following
    if "config" in given and "preset" in given:
        raise ConfigError(
            f"--config={given['config']} and --preset={given['preset']} exclude each other; give "
            "one of them"
        )
    known = dict(presets.get(given.get("preset", "default"), {}))
    if "config" in given:
        saved = _load(given["config"], sections)
        known = {name: value for content in saved.values() for name, value in content.items()}
    known |= given
    if PluginConfig in sections.values():
        plugins = known.get("plugins", ())
        try:
            named = value_of(plugins, tuple[str, ...]) if isinstance(plugins, str) else plugins
        except ValueError as error:
            raise ConfigError(f"flag --plugins={plugins}: {error}") from error
        import_plugins(named)
    vary = lambda config: config.variant(known) if hasattr(config, "variant") else config
    return {section: vary(config) for section, config in sections.items()}


def _define(values: flags.FlagValues, sections: Sections, exclude: set[str]) -> dict[str, str]:
    """Defines the flags; returns the section of every field. Two fields of a name are an error."""
    owner: dict[str, str] = {}
    for section, config in sections.items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if field.name in exclude:
                continue
            if field.name in (*owner, *COMMON):
                raise ConfigError(
                    f"{field.name!r} of section {section!r} is a flag already, of "
                    f"{owner.get(field.name, 'every command')}; give the field another name"
                )
            text, default = field.metadata["help"], field.default
            if field.metadata.get("repeated"):
                flags.DEFINE_multi_string(field.name, None, text, flag_values=values)
            elif hints[field.name] is bool:
                flags.DEFINE_flag(Boolean(field.name, default, text), flag_values=values)
            elif bool in options_of(hints[field.name]):
                flag = OptionalBoolean(field.name, default, text)
                flags.DEFINE_flag(flag, flag_values=values)
            else:
                parser = FieldParser(hints[field.name])
                flags.DEFINE(parser, field.name, default, text, flag_values=values)
            owner[field.name] = section
    return owner


def _define_help(values: flags.FlagValues) -> None:
    flags.DEFINE_flag(Boolean("help", False, "show this help", "h"), flag_values=values)


def _resolve(
    values: flags.FlagValues,
    sections: Sections,
    owner: Mapping[str, str],
    presets: Presets,
    exclude: set[str],
    saved: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    given = {name: values[name].value for name in owner if values[name].present}
    if values.config is not None:
        layered = {name: value for content in saved.values() for name, value in content.items()}
    else:
        layered = dict(presets[values.preset or "default"])
        for config in sections.values():
            if hasattr(config, "without_use"):
                for name in config.without_use(layered | given):
                    layered.pop(name, None)
    layered |= given
    resolved: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for name, value in layered.items():
        if name in exclude:
            continue
        resolved[owner[name]][name] = tuple(value) if isinstance(value, list) else value
    return resolved


def _load(config: str, sections: Sections) -> dict[str, dict[str, Any]]:
    """The sections of a config.json, as they are there."""
    path = files.user_path(config, "--config")
    try:
        with files.given_by("--config", path):
            saved = files.read_json(path, ConfigFile)
    except RunDirectoryError as error:
        raise ConfigError(f"{error}; it must hold {', '.join(sections)}") from error
    _refuse_unknown(config, "section", saved, sections)
    return saved


def _read_config(config: str, sections: Sections) -> dict[str, dict[str, Any]]:
    """The fields that a config.json gives, tuples and types as the dataclasses want them."""
    saved = _load(config, sections)
    fields: dict[str, dict[str, Any]] = {}
    for section, content in saved.items():
        hints = typing.get_type_hints(sections[section])
        _refuse_unknown(config, f"field of section {section!r}", content, hints)
        fields[section] = {
            name: _from_json(config, name, value, hints[name]) for name, value in content.items()
        }
    return fields


def _refuse_unknown(config: str, what: str, found: Iterable[str], known: Iterable[str]) -> None:
    for name in found:
        if name not in known:
            raise ConfigError(
                f"--config={config}: {name!r} is no {what}; it may be one of {', '.join(known)}"
            )


def _from_json(config: str, name: str, value: Any, annotation: Any) -> Any:
    """A JSON value as the field's type; floats may be written as whole numbers."""
    problem = misfit(value, annotation, name)
    if problem is not None:
        raise ConfigError(f"--config={config}: {problem}")
    if isinstance(value, list):
        return tuple(value)
    is_float = type(value) is int and int not in options_of(annotation)
    return float(value) if is_float else value


def _help(
    values: flags.FlagValues, sections: Sections, presets: Presets, default_workdir: str | None
) -> str:
    place = f"is {default_workdir} if not given" if default_workdir else "is needed"
    lines = [f"--workdir=DIRECTORY {place}. Presets: {', '.join(presets)}.", ""]
    lines += _help_of_fields(values, sections, presets["default"])
    return "\n".join([*lines, *(f"--{name}: {values[name].help}" for name in COMMON)])


def _help_of_fields(
    values: flags.FlagValues, sections: Sections, defaults: Mapping[str, Any]
) -> list[str]:
    lines = []
    for section, config in sections.items():
        lines.append(f"{section}:")
        for field in dataclasses.fields(config):
            if field.name in values:
                default = show(defaults.get(field.name, field.default))
                lines.append(f"  --{field.name}: {field.metadata['help']} (default {default})")
        lines.append("")
    return lines


def run(command: Command, argv: Sequence[str], *, goes_on: bool = False) -> int:
    """Runs a command; its exit code. Errors of the user's become one line, others propagate.

    So does the end that a signal asked for, wherever the command is: 130 after Ctrl-C, 143 after
    SIGTERM. Where whoever reads the output has seen enough the command ends without a word, with
    141. Of several processes, one that fails ends here, and the others with it.

    Args:
        command: is given the arguments.
        argv: the arguments, without the program's name.
        goes_on: whether the command, interrupted and given again, goes on where it stood.
    """
    end_with_parent(was_asked)
    _quieten_orbax()
    then = "the same command goes on" if goes_on else "the same command begins anew"
    request = StopRequest()
    says = lambda: f"stopped by {request.name}; {then}"
    try:
        with outputs.watched() as watched, interrupted_by_signals(request, says):
            return _run(command, argv, watched)
    except KeyboardInterrupt:
        if not request.is_set():
            request.set(signal.SIGINT)
        outputs.say_last(says())
        processes.leave(code := exit_code(request.signal_number))
        # Python would wait for threads, and XLA falls over what it was computing.
        atexit.register(outputs.end_at_once, code)
        return code
    except BaseException:
        if processes.are_joined():
            traceback.print_exc()
        processes.leave(1)
        raise
    finally:
        leave_no_more()


# Whatever the user's own defaults are, a seed stands for the same numbers.
@jax.default_prng_impl("threefry2x32")
@jax.threefry_partitionable(True)
def _run(command: Command, argv: Sequence[str], watched: Mapping[str, outputs.Output]) -> int:
    try:
        command(argv)
        sys.stdout.flush()
    except Stopped as stopped:
        if processes.is_first():
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        why = f"memory is short: {first_line(error)}"
    except MemoryError as error:
        why = f"memory is short: {error or 'an array, or a list, does not fit'}"
    except (flags.Error, ConfigError, RunDirectoryError, FloatingPointError) as error:
        why = " ".join(str(error).split())
    except OSError as error:
        name = next((name for name in watched if watched[name].error is error), None)
        if name is None:
            raise
        if isinstance(error, BrokenPipeError):
            return exit_code(signal.SIGPIPE)
        why = f"{name} cannot be written: {error.strerror}"
    else:
        return 0
    where = f" in process {jax.process_index()}" if processes.are_joined() else ""
    print(f"error{where}: {why}", file=sys.stderr)
    processes.leave(USAGE_ERROR)
    return USAGE_ERROR


def _quieten_orbax() -> None:
    """Where a save fails, Orbax raises, and we say so in one line; all else that is logged, by
    Python and asyncio on writes dropped, and by gcsfs on what it tries once more, is noise."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
