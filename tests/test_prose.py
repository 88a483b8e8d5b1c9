"""The pages: short lines and cells, commands and links that are there, results that say whence."""

import ast
import configparser
import csv
import dataclasses
import importlib
import pathlib
import re
import shlex
from typing import NamedTuple

import pytest
from absl import flags
from example_plugins import forget, write

from deltaproduct_jax.errors import ConfigError
from experiments.lib import flags as script_flags
from experiments.lib.sweeps import grid

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        p
        for room in ("deltaproduct_jax", "experiments")
        for p in sorted((ROOT / room).rglob("*.md"))
    ),
]

MOST_COLUMNS = 100
MOST_IN_A_CELL = 100  # characters that are read: links without their targets
# Lines of pages that are to be read at one go.
MOST_ON_PAGE = {"README.md": 120, "deltaproduct_jax/ops/kernels/README.md": 100}

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"\bpython3? (?:-m (?P<module>experiments[\w.]*)|(?P<file>\w[\w/]*\.py))(?P<rest>.*)"
)
ASSIGNED = re.compile(r"^([A-Z]+)=(\S+)$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NOT_PLAIN = r"\brivals?\b|\berrs?\b|\b\w{3,}s a token\b"
HISTORY = r"\b(?:no longer|previously|formerly|anymore|used to be|has been (?:renamed|moved))\b"
# What a word of this field means, said on every page that uses it.
TERMS = {"BOS": "begins", "MQAR": "associative recall", "escape[sd]?": "plateau|preset=escape"}


class Command(NamedTuple):
    """A command as a page shows it: a module of experiments or a file, and its arguments."""

    page: str
    script: str
    arguments: tuple[str, ...]


def name(page):
    return str(page.relative_to(ROOT))


def is_generated(page):
    """Whether a script wrote it: it stands beside data or a picture of its own name."""
    beside = [p for p in page.parent.glob(f"{page.stem}.*") if p != page]
    return RESULTS in page.parents and bool(beside)


def tells_history(page):
    return page.name == "CHANGELOG.md" or page.name.startswith("LOG")


WRITTEN = [page for page in PAGES if not is_generated(page)]
REFERENCE = [page for page in WRITTEN if not tells_history(page)]


def cells(line):
    return [LINK.sub(lambda m: m.group(0).split("](")[0], c).strip() for c in line.split("|")]


def prose(text):
    """Without code, where words mean what they mean in the code."""
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def code(text):
    """Shell code of a page, a piece at a time: its blocks, then what stands in the text."""
    blocks = FENCE.findall(text)
    return [*blocks, *(" ".join(s.split()) for s in re.findall(r"`([^`]+)`", FENCE.sub("", text)))]


def commands_of(page):
    found = []
    for piece in code(page.read_text()):
        values = {}
        for letter, value in ASSIGNED.findall(piece):
            values[letter] = _filled(value, values)
        for match in COMMAND.finditer(piece.replace("\\\n", " ")):
            rest = _filled(match["rest"], values)
            arguments = shlex.split(rest, comments=True)
            found.append(Command(name(page), match["module"] or match["file"], tuple(arguments)))
    return found


def _filled(text, values):
    return re.sub(r"\$([A-Z]+)", lambda match: values[match.group(1)], text)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_lines_are_short():
    long = [
        f"{name(page)}:{number}: {len(line)}"
        for page in WRITTEN
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS and not line.startswith("|")
    ]
    assert not long, f"more than {MOST_COLUMNS} characters"


def test_cells_hold_one_value():
    long = [
        f"{name(page)}:{number}: {cell}"
        for page in WRITTEN
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if line.startswith("|")
        for cell in cells(line)
        if len(cell) > MOST_IN_A_CELL or cell.count("](") > 1 or cell.count("[") > 2
    ]
    assert not long, f"more than {MOST_IN_A_CELL} characters, or two links"


@pytest.mark.parametrize("page", MOST_ON_PAGE)
def test_a_page_is_short(page):
    assert len((ROOT / page).read_text().splitlines()) <= MOST_ON_PAGE[page]


def test_every_folder_of_results_says_how_it_was_made():
    linked = targets(*PAGES)
    folders = {RESULTS, *(path.parent for path in RESULTS.rglob("*") if path.is_file())}
    # What several runs of one command leave is told where their table is.
    for folder in {next((p.parent for p in f.parents if p.name == "records"), f) for f in folders}:
        page = folder / "README.md"
        assert page.exists(), f"{name(folder)} has no README.md"
        assert commands_of(page), f"{name(page)} names no command"
        assert page in linked, f"nothing links to {name(page)}"


def targets(*pages):
    """Files that the pages' relative links lead to."""
    return {
        (page.parent / target.split("#")[0]).resolve()
        for page in pages
        for target in LINK.findall(FENCE.sub("", page.read_text()))
        if "://" not in target and not target.startswith("#")
    }


def test_links_lead_somewhere():
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text())):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), f"{name(page)}: {target} is not there"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{name(page)}: {target} has no such heading"


def test_reference_is_plain_and_tells_no_history():
    for page in REFERENCE:
        text = prose(page.read_text())
        for words in (NOT_PLAIN, HISTORY):
            found = re.search(words, text, re.IGNORECASE)
            assert not found, f"{name(page)}: {found.group(0)!r}"


@pytest.mark.parametrize("term", TERMS)
def test_terms_are_said_where_they_stand(term):
    for page in REFERENCE:
        text = page.read_text()
        if re.search(rf"\b{term}\b", prose(text)):
            assert re.search(TERMS[term], text), f"{name(page)} does not say what {term!r} is"


# Of all pages but the one that has old names beside new ones.
COMMANDS = sorted({c for page in PAGES if page.name != "CHANGELOG.md" for c in commands_of(page)})


def test_every_script_stands_on_the_page_beside_it():
    scripts = {
        name(path).removesuffix(".py").replace("/", ".")
        for path in (ROOT / "experiments").rglob("*.py")
        if "__main__" in path.read_text() and "lib" not in path.parts
    }
    pages = [p for p in PAGES if p.name == "README.md" and (p.parent / "__init__.py").exists()]
    shown = {
        (page.parent, command.script.removesuffix(".py").replace("/", "."))
        for page in pages
        for command in commands_of(page)
    }
    missing = {s for s in scripts if ((ROOT / s.replace(".", "/")).parent, s) not in shown}
    assert not missing, "on no page beside them"
    assert {script for folder, script in shown if "experiments" in folder.parts} <= scripts


@pytest.fixture
def plugins_here(tmp_path, monkeypatch):
    """The files that a page shows, where its commands look for them."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    forget()


# Of a machine that lacks a package, or a run that another command has written before.
NOT_HERE = (
    r"needs (?:torch|(?:the )?package) |^package \w+, .* is not installed|"
    r"cannot be read: No such file|is no file"
)
NO_FOLDER = "--workdir is missing"  # a script's name in the text, or one line of a table


def config_of(kind, values, others):
    """A section of a command's flags; a model has the vocabulary of its task, or any."""
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if needed - values.keys() == {"vocab_size"}:
        task = others.get("task")
        values = {**values, "vocab_size": 257 if task is None else task.vocab_size}
    return kind(**values)


@pytest.fixture
def only_read(monkeypatch):
    """Commands end with what they were told, once all of it has been found to make sense."""
    parse, parse_fields = script_flags.parse, script_flags.parse_fields

    def understood(found, kinds):
        built = {}
        for name, kind in kinds.items():
            built[name] = config_of(kind, found[name], built)
        raise SystemExit  # as after --help

    def read(argv, sections, presets, **options):
        found = parse(argv, sections, presets, **options)
        understood(found.sections, script_flags.chosen(argv, sections, presets))

    monkeypatch.setattr(script_flags, "parse", read)
    monkeypatch.setattr(
        script_flags, "parse_fields", lambda *given: understood(parse_fields(*given), given[1])
    )


def docstring_commands():
    """Commands in the docstrings of scripts, which stand there as indented lines."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = text.replace("\\\n", " ").splitlines()
        for match in COMMAND.finditer("\n".join(x for x in lines if x.startswith("    "))):
            arguments = shlex.split(match["rest"], comments=True)
            yield Command(name(path), match["module"] or match["file"], tuple(arguments))


@pytest.mark.usefixtures("plugins_here", "only_read")
def test_commands_are_there_and_their_values_make_sense():
    """Each is given to its script, which reads and checks every flag and goes no further."""
    read = 0
    for page, script, arguments in [*COMMANDS, *docstring_commands()]:
        shown = f"{page}: {script} {' '.join(arguments)}"
        if script.endswith(".py"):
            assert (ROOT / script).exists(), shown
            continue
        try:
            module = importlib.import_module(script)
            command = module.EXPERIMENT.command if hasattr(module, "EXPERIMENT") else module.command
            command(arguments)
        except SystemExit:
            read += 1
        except (ImportError, ConfigError, flags.Error) as error:
            is_mention = not arguments or is_generated(ROOT / page)
            known = NOT_HERE if not is_mention else f"{NOT_HERE}|{NO_FOLDER}"
            if not re.search(known, str(error)):
                raise AssertionError(f"{shown}: {error}") from error
        else:
            raise AssertionError(f"{shown} reads no flags")
    assert read > 0.8 * len(COMMANDS)


def test_what_pages_install_is_there():
    """Extras of pip by their names in setup.cfg, and the one command that comes with them."""
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    known, shown = set(extras["options.extras_require"]), set()
    for page in PAGES:
        for listed in re.findall(
            r"(?:pip install|deltaproduct_jax)[^\n]*?\[([a-z,]+)\]", code_of(page)
        ):
            shown |= set(listed.split(","))
    assert shown == known
    (script,) = extras["options.entry_points"]["console_scripts"].split("=")[:1]
    commands = {
        found for page in PAGES for found in re.findall(r"\bdeltaproduct-[\w-]+", code_of(page))
    }
    assert commands == {script.strip()}


def code_of(page):
    return "\n".join(code(page.read_text()))


@pytest.mark.usefixtures("plugins_here")
def test_sweeps_on_pages_can_be_run():
    """The first run of each is configured as the sweep would."""
    for page, script, arguments in COMMANDS:
        given = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
        if script == "experiments.sweep" and {"grid", "script"} <= given.keys():
            values = grid.parse_grid("--grid", given["grid"])
            first = ";".join(f"{key}={of_key[0]}" for key, of_key in values.items())
            assert grid.expand(given["script"], [first], given.get("fixed", "")), page


# Tables that a person copied onto a page of results say what the records beside them say.
RECIPES = RESULTS / "recipes"
SCORE = "results.test.{}.strict.sequence_accuracy"


def tables_of(page):
    """Head and rows of each table."""
    found = re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE)
    cut = ([[c.strip() for c in line.split("|")[1:-1]] for line in t.splitlines()] for t in found)
    return [(lines[0], lines[2:]) for lines in cut]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def rounded(cells):
    """To three digits; a run that has not ended has none, which a page shows as a dash."""
    return [round(float(cell), 3) if cell not in ("", "-") else None for cell in cells]


# A table with a column for seeds, whose others are the settings beside them and lengths tested.
BY_SEED = [
    (page.parent, head, rows)
    for page in sorted(RESULTS.rglob("README.md"))
    if page.with_name("results.csv").exists()
    for head, rows in tables_of(page)
    if "seed" in head and any("(trained)" in name for name in head)
]


@pytest.mark.parametrize(("folder", "head", "rows"), BY_SEED, ids=lambda x: getattr(x, "name", ""))
def test_scores_by_seed_are_those_of_the_runs(folder, head, rows):
    fields = {"layers": "num_layers", "n_h": "num_householder"}
    settings = [fields.get(name, name) for name in head[: head.index("seed") + 1]]
    lengths = [name.split()[0] for name in head[len(settings) :]]
    runs = rows_of(folder / "results.csv")
    assert len(rows) == len(runs)
    scores = {tuple(r[s] for s in settings): [r[SCORE.format(n)] for n in lengths] for r in runs}
    for row in rows:
        assert rounded(row[len(settings) :]) == rounded(scores[tuple(row[: len(settings)])])
        (trained,) = {run["train_length"] for run in runs}
        assert f"{trained} (trained)" in head


def test_such_tables_are_there():
    names = {"A5", "A5_cpu", "S4", "S5", "S5_128", "s4", "paper"}
    assert {folder.name for folder, _, _ in BY_SEED} >= names


CHANGES = next(t for t in tables_of(RECIPES / "README.md") if t[0][0] == "change")


@pytest.mark.parametrize("column", [1, 2, 3], ids=lambda column: CHANGES[0][column])
def test_what_one_change_does_is_what_its_runs_say(column):
    preset = CHANGES[0][column]
    runs = rows_of(RECIPES / preset / "results.csv")
    length = SCORE.format(4 * int(runs[0]["train_length"]))
    scores = {"none": rounded(run[length] for run in runs)}
    for row in rows_of(RECIPES / "changes.csv"):
        assert row["state"] == "done"
        if row["preset"] == preset:
            change = row["changed"].split(":")[0].replace("paper", "the paper's recipe")
            scores.setdefault(change, []).extend(rounded([row["times_4"]]))
    shown = {row[0].split(" (")[0].strip("`"): row[column] for row in CHANGES[1]}
    for change, cell in filter(lambda entry: entry[1], shown.items()):
        least, _, most = cell.partition(" to ")
        found = scores[change]
        assert rounded([least, most or least]) == [min(found), max(found)], change
    assert shown.keys() >= {c for c in scores if ";" not in c}
