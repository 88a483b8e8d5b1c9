"""Strict settings for every test, shape checking of the package, and the end of a run."""

import os

# Before JAX is imported: several devices, so that sharding tests run on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jaxtyping
import pytest

# Before the package is imported: users do not pay for the checks, tests do.
jaxtyping.install_import_hook(
    ["deltaproduct_jax.ops", "deltaproduct_jax.layers", "deltaproduct_jax.models"],
    "beartype.beartype",
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# With CI set in the environment, a skip for any other reason fails the run.
ALLOWED_SKIPS = (
    "needs a GPU",
    "needs a TPU",
)

_unexpected_skips: list[str] = []


@pytest.fixture
def unchecked():
    """The user's path: the package's own errors, without the shape checker in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_runtest_logreport(report):
    _note_skip(report)


def pytest_collectreport(report):
    _note_skip(report)


def _note_skip(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        if not any(allowed in str(reason) for allowed in ALLOWED_SKIPS):
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session):
    if os.environ.get("CI") and _unexpected_skips and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("CI") and _unexpected_skips:
        terminalreporter.section("skips that are not on the list in tests/conftest.py")
        for line in _unexpected_skips:
            terminalreporter.line(line)
    # Imported late: at the top it would import the package before the hook above is in place.
    from helpers import WORST

    if not WORST:
        return
    terminalreporter.section("worst ||x - ref|| / ||ref|| against float64")
    terminalreporter.line(
        f"{'implementation':<16}{'dtype':<10}{'outputs':>9}{'gradients':>11}  cases"
    )
    for (implementation, dtype), worst in sorted(WORST.items()):
        terminalreporter.line(
            f"{implementation:<16}{dtype:<10}{worst['outputs']:>9.1e}"
            f"{worst['gradients']:>11.1e}{worst['cases']:>7}"
        )
