"""What a sweep runs: grids written as text, expanded to a list that is saved and checked.

A grid is ``key=values;key=values``: values are a comma list, ``0:5`` is 0,1,2,3,4 (``0:10:5`` is
0,5), and a value that has commas itself stands in parentheses: ``curriculum=(),(4,8,16)``. Every
combination is a run; of several grids all runs are run. Keys are the flags of the script.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from absl import flags as absl_flags

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, found_module
from deltaproduct_jax.files import is_there, read_json, write_file
from deltaproduct_jax.training.locks import Lock
from deltaproduct_jax.training.plugins import absolute, import_plugins
from deltaproduct_jax.training.records import ConfigFile, refuse_other_config
from experiments.lib import flags
from experiments.lib.sweeps.devices import SETTINGS

LIST = "runs.json"
RUNS = "runs"
RANGE = re.compile(r"(-?[0-9]{1,18}):(-?[0-9]{1,18})(?::([1-9][0-9]{0,17}))?")
# What a run of any task takes from the task itself, so that it has no flag.
NO_FLAGS = ("vocab_size",)
MOST_RUNS = 10_000  # unless a flag says more
LONGEST_NAME = 150  # of 255 that file systems allow, since Orbax and editors add to names
LOCK_WAIT_S = 60.0


class _SavedRun(TypedDict):
    name: str
    settings: dict[str, str]
    keys: list[str]
    config: ConfigFile


class _SavedList(TypedDict):
    script: str
    runs: list[_SavedRun]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        settings: flags of the script as they are written, by name.
        keys: the settings that came from a grid.
        config: the resolved configuration, as config.json holds it; it tells runs apart.
    """

    name: str
    settings: dict[str, str]
    keys: tuple[str, ...]
    config: dict[str, Any]

    def argv(self) -> list[str]:
        """The flags, without the run directory."""
        return [f"--{key}={value}" for key, value in self.settings.items()]


def module_name(script: str) -> str:
    """The module of a script: one of experiments, or any where the name has a dot."""
    return script if "." in script else f"experiments.{script}"


def load_script(script: str) -> types.ModuleType:
    """The module of a script; ConfigError if there is none, or none that can be swept."""
    name, folder = module_name(script), Path(__file__).parents[2]
    module = found_module(name)
    needed = ("SECTIONS", "PRESETS", "configure")
    if not all(hasattr(module, attribute) for attribute in needed):
        sweepable = [path.stem for path in sorted(folder.glob("*.py")) if _is_script(path)]
        raise ConfigError(
            f"script={script!r} is not known; it may be one of {', '.join(sweepable)}, or a module "
            f"elsewhere with {', '.join(needed)}"
        )
    return module


def _is_script(path: Path) -> bool:
    return re.search(r"^SECTIONS, configure\b", path.read_text(), re.M) is not None


def parse_grid(flag: str, text: str, most: int = MOST_RUNS) -> dict[str, list[str]]:
    """The values of every key, in the order written.

    Raises:
        ConfigError: it cannot be read, or a key has more than ``most`` values.
    """
    values: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, listed = (piece.strip() for piece in part.partition("="))
        if not (key and equals):
            raise ConfigError(f"{flag}={text!r}: {part!r} must be key=value or key=value,value")
        if key in values:
            raise ConfigError(f"{flag}={text!r} has {key!r} twice; give all its values at once")
        items = _split(flag, listed)
        values[key] = [value for item in items for value in _expand(flag, item, most)]
    if not values:
        raise ConfigError(f"{flag}={text!r} is empty; it may be seed=0:5;num_householder=1,2")
    return values


def parse_fixed(text: str, flag: str = "--fixed") -> dict[str, str]:
    """One value a key, taken as it is; ConfigError where that cannot be read."""
    fixed = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals):
            raise ConfigError(f"{flag}={text!r}: {part!r} must be key=value")
        if key in fixed:
            raise ConfigError(f"{flag}={text!r} has {key!r} twice; give it once")
        fixed[key] = _bare(value)
    return fixed


def _split(flag: str, listed: str) -> list[str]:
    """The items of a comma list; commas inside parentheses belong to an item."""
    items, depth = [""], 0
    for character in listed:
        depth += (character == "(") - (character == ")")
        if depth not in (0, 1):
            break
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth != 0:
        raise ConfigError(f"{flag}: the parentheses of {listed!r} do not match")
    return [item.strip() for item in items]


def _expand(flag: str, item: str, most: int) -> list[str]:
    match = RANGE.fullmatch(item)
    if match is None:
        return [_bare(item)]
    start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if start >= stop:
        raise ConfigError(f"{flag}: range {item} is empty; 0:5 is 0,1,2,3,4")
    numbers = range(start, stop, step)
    _require_fewer(flag, f"range {item}", -(-(stop - start) // step), most)
    return [str(number) for number in numbers]


def _require_fewer(flag: str, what: str, count: int, most: int) -> None:
    """Raises ConfigError where there would be too many runs, before any is made."""
    if count > most:
        raise ConfigError(
            f"{flag}: {what} makes {count:,} runs, and {most:,} are the most; a sweep takes more "
            "with --max_runs"
        )


def _bare(value: str) -> str:
    return value[1:-1] if value.startswith("(") and value.endswith(")") else value


def expand(script: str, grids: Sequence[str], fixed: str, most: int = MOST_RUNS) -> list[Run]:
    """All runs of the grids, each configuration once; nothing is started by looking at them.

    Raises:
        ConfigError: a key is no flag of the script, a run's settings make no sense, or there are
            more than ``most`` runs.
    """
    module, constants = load_script(script), parse_fixed(fixed)
    parsed = [parse_grid("--grid", text, most) for text in grids]
    count = sum(math.prod(map(len, grid.values())) for grid in parsed)
    _require_fewer("--grid", "what is given", count, most)
    import_plugins_of(constants, parsed)
    refuse_unknown(module, script, "--fixed", constants)
    runs: list[Run] = []
    taken: set[str] = set()
    seen: set[str] = set()
    for grid in parsed:
        refuse_unknown(module, script, "--grid", grid)
        for key in grid.keys() & constants.keys():
            raise ConfigError(f"{key!r} is in both --grid and --fixed; give it in one of them")
        for combination in itertools.product(*grid.values()):
            swept = dict(zip(grid, combination, strict=True))
            config = build(module, constants | swept)
            if identity(config) in seen:
                continue
            name = name_of(swept, taken)
            seen.add(identity(config))
            taken.add(name)
            runs.append(Run(name, constants | swept, tuple(swept), config))
    return runs


def import_plugins_of(constants: dict[str, str], grids: Iterable[dict[str, list[str]]]) -> None:
    """Imports what the settings name; files get whole paths, since runs may start elsewhere."""
    whole = lambda text: ",".join(map(absolute, text.split(",")))
    if "plugins" in constants:
        constants["plugins"] = whole(constants["plugins"])
    for grid in grids:
        if "plugins" in grid:
            grid["plugins"] = list(map(whole, grid["plugins"]))
    texts = [constants.get("plugins", ""), *(t for grid in grids for t in grid.get("plugins", ()))]
    import_plugins(plugin for text in texts for plugin in text.split(",") if plugin)


def identity(config: Mapping[str, Any]) -> str:
    """The same for the same configuration, and for no other."""
    return json.dumps(config, sort_keys=True)


def refuse_unknown(module: types.ModuleType, script: str, flag: str, keys: Iterable[str]) -> None:
    """Raises ConfigError, naming the closest, for a key that is no flag of the script."""
    known = {"preset"}
    for section in module.SECTIONS.values():
        for kind in section.variants() if hasattr(section, "variants") else [section]:
            known |= {field.name for field in dataclasses.fields(kind)} - set(NO_FLAGS)
    for key in keys:
        if key in SETTINGS:
            raise ConfigError(f"{flag}: {key!r} is no setting of {script}; it is one of --devices")
        if key not in known:
            (closest,) = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0)
            raise ConfigError(
                f"{flag}: {key!r} is no setting of {script}; did you mean {closest!r}?"
            )


def build(module: types.ModuleType, settings: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that the script makes of these flags; ConfigError names the settings."""
    written = [f"--{key}={value}" for key, value in settings.items()]
    try:
        parsed = flags.parse(
            ["--workdir=.", *written],
            module.SECTIONS,
            module.PRESETS,
            exclude=NO_FLAGS,
            writes=False,
        )
        config = module.configure(parsed.sections).to_dict()
    except (absl_flags.Error, ConfigError) as error:
        raise ConfigError(f"run {' '.join(written)}: {error}") from error
    try:  # a script's own classes may not ask
        json.dumps(config, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"run {' '.join(written)}: a number is not finite") from error
    return config


def name_of(swept: Mapping[str, str], taken: set[str]) -> str:
    """A folder's name that can be read, of characters that no shell or file system minds."""
    pairs = (f"{key}={re.sub('[^A-Za-z0-9._+-]+', '-', value)}" for key, value in swept.items())
    name = ",".join(pairs)
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(json.dumps(swept).encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_NAME]}-{digest}"
    numbered = (f"{name}~{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def is_run_name(name: str) -> bool:
    """Whether :func:`name_of` may have made a name: one folder, in the sweep's own."""
    return re.fullmatch("[A-Za-z0-9_+~=,-][A-Za-z0-9._+~=,-]*", name) is not None


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held for moments, while one of several sweeps in a folder writes there."""
    lock, end = Lock(folder / ".sweep.lock"), time.monotonic() + LOCK_WAIT_S
    while not lock.acquire():
        if time.monotonic() > end:
            raise RunDirectoryError(f"{folder} is in use by {lock.owner()} for too long")
    try:
        yield
    finally:
        lock.release()


def read_list(folder: Path) -> tuple[str, list[Run]]:
    """Script and runs of a saved list; RunDirectoryError if it is not one."""
    path = folder / LIST
    if not path.exists():
        raise RunDirectoryError(f"workdir={folder} has no {LIST}; it may be the folder of a sweep")
    saved = read_json(path, _SavedList)
    runs, taken = [], set()
    for index, run in enumerate(saved["runs"]):
        place, name, keys = f"{path}: runs[{index}]", run["name"], tuple(run["keys"])
        if not is_run_name(name):
            raise RunDirectoryError(f"{place}.name={name!r} is no name of a run's folder")
        if name in taken:
            raise RunDirectoryError(f"{place}.name={name!r} is there twice")
        taken.add(name)
        unset = [key for key in keys if key not in run["settings"]]
        if unset:
            raise RunDirectoryError(f"{place}.keys has {unset[0]!r}, which is not in its settings")
        runs.append(Run(name, run["settings"], keys, run["config"]))
    return saved["script"], runs


def claim(
    folder: Path,
    script: str | None,
    grids: Sequence[str],
    fixed: str,
    most: int = MOST_RUNS,
    accept: Callable[[str, Sequence[Run]], None] = lambda script, runs: None,
    *,
    to_run: bool = True,
) -> list[Run]:
    """The runs of a sweep, saved in its folder before any is started.

    A folder that holds a sweep goes on with it: without grids as it was, with grids only if they
    hold every run that is there, to which theirs are added. Where nothing is ``to_run`` and no
    grid is given, the script and its plug-ins need not be there.

    Raises:
        ConfigError: the grids cannot be honoured, or ``accept`` raises it of the script's runs.
        RunDirectoryError: the folder holds another sweep, or cannot be read or written.
    """
    saved_script, saved = read_list(folder) if is_there(folder / LIST) else (None, [])
    if saved_script is None and (script is None or not grids):
        raise ConfigError(
            f"--{'script' if script is None else 'grid'} is missing: {folder} holds no sweep to go "
            "on with"
        )
    if fixed and not grids:
        raise ConfigError(f"--fixed={fixed!r} needs --grid, whose runs it is for")
    if saved_script is not None and script not in (None, saved_script):
        raise RunDirectoryError(
            f"{folder} holds a sweep of {saved_script}, not of {script}; give another workdir"
        )
    if not grids and not to_run:
        return saved
    module = load_script(saved_script or script)
    saved = [_as_now(run, module, folder) for run in saved]
    wanted = expand(saved_script or script, grids, fixed, most) if grids else saved
    accept(saved_script or script, wanted)
    if not grids:
        return saved
    with folder_lock(folder):
        if (folder / LIST).exists():  # or has come into being, by another process
            known = {run.name: run for run in saved}
            saved_script, saved = read_list(folder)
            saved = [known.get(run.name) or _as_now(run, module, folder) for run in saved]
        merged = merge(folder, saved, wanted)
        if merged != saved:
            content = {
                "script": script or saved_script,
                "runs": list(map(dataclasses.asdict, merged)),
            }
            write_file(folder / LIST, json.dumps(content, indent=1).encode() + b"\n")
    return merged


def _as_now(run: Run, module: types.ModuleType, folder: Path) -> Run:
    """A saved run as the program, which may have changed since, knows it; or RunDirectoryError."""
    config = build(module, run.settings)
    refuse_other_config(run.config, config, folder / RUNS / run.name)
    return dataclasses.replace(run, config=config)


def merge(folder: Path, saved: Sequence[Run], wanted: Sequence[Run]) -> list[Run]:
    """The saved runs and those that are new; RunDirectoryError unless all saved are wanted."""
    ours, theirs = ({identity(run.config) for run in runs} for runs in (wanted, saved))
    missing = [run.name for run in saved if identity(run.config) not in ours]
    if missing:
        raise RunDirectoryError(
            f"{folder} holds another sweep: {len(missing)} of its {len(saved)} runs, such as "
            f"{missing[0]}, are not in this grid; give another workdir, or a grid that adds to it"
        )
    taken = {run.name for run in saved}
    merged = list(saved)
    for run in wanted:
        if identity(run.config) not in theirs:
            swept = {key: run.settings[key] for key in run.keys}
            name = run.name if run.name not in taken else name_of(swept, taken)
            taken.add(name)
            merged.append(dataclasses.replace(run, name=name))
    return merged
