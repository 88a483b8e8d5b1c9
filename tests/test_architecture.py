"""Rules of the tree that no single file can hold: who may import whom, sizes, style."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "deltaproduct_jax"

# What each part may import: ops <- layers <- models <- {theory, training, analysis, interop}, and
# tasks is a leaf for theory, training, experiments. errors.py, settings.py: leaves for everybody.
ALLOWED = {
    "errors": set(),
    "settings": set(),
    "files": {"errors"},
    "compilers": {"errors"},
    "ops": {"errors"},
    "tasks": {"errors", "settings"},
    "layers": {"errors", "ops"},
    "models": {"errors", "settings", "ops", "layers"},
    "theory": {"errors", "models", "tasks"},
    "training": {"errors", "settings", "files", "ops", "layers", "models", "tasks"},
    "analysis": {"errors", "ops", "layers", "models"},
    "interop": {"errors", "ops", "layers", "models"},
}

MOST_LINES = 400
# Longer files, each with its reason.
LONGER = {}

FILES = sorted(
    path
    for folder in ("deltaproduct_jax", "experiments", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def parts_imported(path):
    """The parts of the package that a file imports, relative imports included."""
    found = set()
    inside = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "deltaproduct_jax" and rest:
                found.add(rest.split(".")[0])
    return found


@pytest.mark.parametrize("part", [*ALLOWED, "experiments"])
def test_imports_point_one_way(part):
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    for path in filter(pathlib.Path.exists, files):
        if part in ALLOWED:
            wrong = parts_imported(path) - ALLOWED[part] - {part}
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_part_has_its_rule():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__"} <= ALLOWED.keys()


def test_nobody_imports_experiments_or_tests():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("experiments", "tests"):
            assert f"import {name}" not in text, path
            assert f"from {name}" not in text, path


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    too_long = {n: k for n, k in lengths.items() if k > MOST_LINES and n not in LONGER}
    assert not too_long, f"more than {MOST_LINES} lines; split them, or add them with a reason"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
