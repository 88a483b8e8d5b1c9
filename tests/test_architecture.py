"""Rules of the tree that no single file can hold: who may import whom, sizes, style."""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, EXPERIMENTS, TESTS = (ROOT / n for n in ("deltaproduct_jax", "experiments", "tests"))

# What each part of the package may import beside itself:
#   {errors, settings, strict_json, files} <- ops <- layers <- models <- parallel
#   <- {theory, analysis, interop} <- training <- evaluation <- experiments
# tasks and data are leaves above the first four. compilers is for experiments and tests alone.
LEAVES = {"errors", "settings", "strict_json", "files"}
FLOORS = [{"ops"}, {"layers"}, {"models"}, {"parallel"}, {"theory", "analysis", "interop"}]
FLOORS += [{"training"}, {"evaluation"}]
ASIDE = {"tasks", "data"}
BELOW = [set().union(*FLOORS[:index]) for index in range(len(FLOORS))]
ALLOWED = {"errors": set(), "settings": {"errors"}, "strict_json": {"errors", "settings"}}
ALLOWED |= {"files": LEAVES - {"files"}}
ALLOWED |= {"compilers": LEAVES | {"ops"}} | dict.fromkeys(ASIDE, LEAVES)
for floor, below in zip(FLOORS, BELOW, strict=True):
    beside = ASIDE if "parallel" in below else set()
    ALLOWED |= {part: LEAVES | below | beside for part in floor}
# Modules of the package's root that bring parts together for users; nothing inside imports them.
FACADES = {"__init__"}

MOST_LINES, MOST_FILES = 400, 25
# Longer files, each with its reason.
LONGER = {}

FILES = sorted(path for folder in (PACKAGE, EXPERIMENTS, TESTS) for path in folder.rglob("*.py"))
SCRIPTS = sorted(
    path
    for path in EXPERIMENTS.rglob("*.py")
    if path.stem != "__init__" and EXPERIMENTS / "lib" not in path.parents
)
LIBRARY = sorted((EXPERIMENTS / "lib").rglob("*.py"))
# Scripts that say in so many words where they come from, what to expect and how long they take.
ANSWERS = ("Source:", "Expect:", "Takes:")


def name_of(path):
    """The module of a file, dotted, from the project's root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imported(path):
    """What a file imports, dotted, wherever in it; relative imports resolved."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path):
    """The parts of the package that a file imports."""
    names = (name.split(".") for name in imported(path))
    return {parts[1] for parts in names if parts[0] == "deltaproduct_jax" and len(parts) > 1}


def imports_module(path, module):
    """Whether a file imports a module or something of it."""
    return any(f"{name}.".startswith(f"{module}.") for name in imported(path))


def has_main(path):
    """Whether a file does something when it is run by name."""
    tests = [node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return any("__name__" in ast.unparse(test) for test in tests)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part):
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    for path in filter(pathlib.Path.exists, files):
        wrong = parts_imported(path) - ALLOWED[part] - {part}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_part_has_its_rule():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - FACADES <= ALLOWED.keys()


def test_nothing_goes_in_circles_between_parts():
    """What the table allows has no way back; without this a table could hold a circle."""
    order = [{"errors"}, {"settings"}, {"strict_json"}, {"files"}, ASIDE, *FLOORS]
    assert set().union(*order[:4]) == LEAVES
    height = {part: level for level, floor in enumerate(order) for part in floor}
    for part, allowed in ALLOWED.items():
        if part in height:
            assert all(height[other] < height[part] for other in allowed), part


def test_nobody_imports_experiments_or_tests():
    for path in PACKAGE.rglob("*.py"):
        found = {name.split(".")[0] for name in imported(path)} & {"experiments", "tests"}
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


def test_no_script_imports_a_script():
    """Machinery is in experiments/lib; the quickstart alone is a use of the training script."""
    allowed = {("experiments.quickstart", "experiments.state_tracking")}
    for path in SCRIPTS:
        for other in map(name_of, SCRIPTS):
            if other != name_of(path) and (name_of(path), other) not in allowed:
                assert not imports_module(path, other), f"{name_of(path)} imports {other}"


def test_machinery_imports_no_script_and_is_none():
    for path in LIBRARY:
        for script in map(name_of, SCRIPTS):
            assert not imports_module(path, script), f"{name_of(path)} imports {script}"
        assert not has_main(path), f"{name_of(path)} has a __main__; a script is outside lib"


def test_every_script_can_be_run_and_says_how():
    for path in SCRIPTS:
        assert has_main(path), f"{name_of(path)} is no script; machinery goes to experiments/lib"
        text = ast.get_docstring(ast.parse(path.read_text()))
        commands = (f"python -m {name_of(path)}", f"python3 {path.relative_to(ROOT)}")
        assert any(command in text for command in commands), f"{name_of(path)} shows no command"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_says_its_source_what_to_expect_and_how_long_it_takes(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    missing = [word for word in ANSWERS if f"\n{word} " not in text]
    assert not missing, f"the docstring of {name_of(path)} has no line with {missing}"


def test_forms_of_rows_are_chosen_in_one_place():
    """Whoever else has rows of channels asks there, and what is above the ops launches nothing."""
    door, forms = "deltaproduct_jax.ops.blocks.rows", ("wide", "short")
    kernels = "deltaproduct_jax.ops.kernels"
    for path in PACKAGE.rglob("*.py"):
        for form in (f"deltaproduct_jax.ops.blocks.{form}" for form in forms):
            assert name_of(path) == door or not imports_module(path, form), name_of(path)
        if path.relative_to(PACKAGE).parts[0] not in ("ops", "compilers"):
            assert not imports_module(path, kernels), f"{name_of(path)} imports kernels"


def test_matplotlib_is_imported_in_one_place():
    """Where a figure is drawn: training works without it."""
    places = {path for path in FILES if TESTS not in path.parents}
    found = {name_of(path) for path in places if imports_module(path, "matplotlib")}
    style = EXPERIMENTS / "lib" / "figures" / "style.py"
    under_type_checking = {name_of(style)} | {
        f"experiments.lib.figures.{name}" for name in ("curves", "geometry", "searched", "texts")
    }
    assert found <= under_type_checking
    for name in found:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), f"{name} imports it when imported"


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    too_long = {n: k for n, k in lengths.items() if k > MOST_LINES and n not in LONGER}
    assert not too_long, f"more than {MOST_LINES} lines; split them, or add them with a reason"


def test_no_folder_has_too_many_files():
    counts = collections.Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    too_many = {folder: count for folder, count in counts.items() if count > MOST_FILES}
    assert not too_many, f"more than {MOST_FILES} Python files; split the folder by topic"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
