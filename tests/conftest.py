"""Strict settings for every test, shape checking of the package, and the end of a run."""

import gc
import importlib.metadata
import os
import signal
import sys
import types
from pathlib import Path

# Before JAX is imported: several devices, so that sharding tests run on any machine, and little
# optimisation, since a run spends most of its time compiling. The accuracy of the chunked form is
# tested fully optimised too, as people run it (ops/test_accuracy.py; all of it with --slow).
xla_flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Halves the time again, and small programs gain nothing by being compiled in 32 parts; later
    # versions refuse to start with a flag that they do not know.
    xla_flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([*xla_flags, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_where_it_names_arrays(**options):
    """What has no array among its annotations is not wrapped: that took a tenth of the time."""

    def decorate(fn):
        annotations = getattr(fn, "__annotations__", {}).values()
        names_arrays = any("jaxtyping." in repr(annotation) for annotation in annotations)
        return _jaxtyped(fn, **options) if names_arrays else fn

    return decorate


jaxtyping.jaxtyped = _jaxtyped_where_it_names_arrays

# Before the package is imported: users do not pay for the checks, tests do.
jaxtyping.install_import_hook(
    ["deltaproduct_jax.ops", "deltaproduct_jax.layers", "deltaproduct_jax.models"],
    "beartype.beartype",
)

jax.config.update("jax_numpy_rank_promotion", "raise")

from deltaproduct_jax.parallel import layout

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Runs take one device, as on most CPUs; the others are for tests that ask for them.
_all_devices = layout.all_devices
layout.all_devices = lambda: _all_devices()[:1]

# With CI set in the environment, a skip for any other reason fails the run.
ALLOWED_SKIPS = (
    "needs a GPU",
    "needs libtpu",
    "needs Triton",
    "needs lm_eval",
    "needs gcsfs",
)

_unexpected_skips: list[str] = []
_of_processes: list[list] = []  # what other processes of this run measured


TESTS = Path(__file__).parent

# Begun last, one of these would keep a process when the other has no more.
LONGEST = (
    "ops/kernels/test_tpu_compile.py",
    "ops/test_accuracy.py",
    "ops/kernels/test_triton.py",
    "parallel/test_processes.py",
    "experiments/language/test_language_legs.py",
    "experiments/test_state_tracking.py",
    "layers/test_mixers.py",
    "ops/test_sharding.py",
    "layers/test_interoperation.py",
    "training/test_kill.py",
)


def pytest_collection_modifyitems(items):
    order = {TESTS / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    """A tenth of the time would go into searching what tracing allocates for cycles."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


# Where every dtype must be so on purpose; elsewhere there is code of others, which mixes them.
STRICT = {"generation", "layers", "models", "ops", "tasks", "training"}


@pytest.fixture(scope="module", autouse=True)
def strict_promotion_of_dtypes(request):
    """As users may ask of JAX, also for what the tests of a module share."""
    with jax.numpy_dtype_promotion("strict" if request.path.parent.name in STRICT else "standard"):
        yield


@pytest.fixture(scope="module")
def all_devices():
    """Runs take all simulated devices, as they do for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "all_devices", _all_devices)
        yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What one run of the module has compiled is not compiled again by the next."""
    import tiny_run

    with tiny_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def tiny_model():
    """Runs train a model that compiles at once."""
    import tiny_run

    from deltaproduct_jax.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        yield


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
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of several processes: the first of them sums up
        output["skips"], output["worst"] = _unexpected_skips, _worst_errors()
    elif os.environ.get("CI") and _unexpected_skips and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A process of pytest-xdist has ended, and says what it saw."""
    output = getattr(node, "workeroutput", {})
    _unexpected_skips.extend(s for s in output.get("skips", ()) if s not in _unexpected_skips)
    _of_processes.extend(output.get("worst", ()))


def _worst_errors() -> list[list]:
    """Rows [implementation, dtype, errors] of what this process measured, as plain numbers."""
    worst = getattr(sys.modules.get("helpers"), "WORST", {})
    return [[*key, {n: float(x) for n, x in errors.items()}] for key, errors in worst.items()]


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("CI") and _unexpected_skips:
        terminalreporter.section("skips that are not on the list in tests/conftest.py")
        for line in _unexpected_skips:
            terminalreporter.line(line)
    together = {}
    for implementation, dtype, errors in _worst_errors() + _of_processes:
        row = together.setdefault((implementation, dtype), dict.fromkeys(errors, 0))
        for name in ("outputs", "gradients"):
            row[name] = max(row[name], errors[name])
        row["cases"] += errors["cases"]
    if not together:
        return
    terminalreporter.section("worst ||x - ref|| / ||ref|| against float64")
    terminalreporter.line(
        f"{'implementation':<16}{'dtype':<10}{'outputs':>9}{'gradients':>11}  cases"
    )
    for (implementation, dtype), errors in sorted(together.items()):
        terminalreporter.line(
            f"{implementation:<16}{dtype:<10}{errors['outputs']:>9.1e}"
            f"{errors['gradients']:>11.1e}{errors['cases']:>7.0f}"
        )


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Every program takes memory maps, of which a process may have only so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def cudnn(monkeypatch):
    """A process that finds cuDNN, as far as tracing and lowering go."""
    from jax._src.cudnn import fused_attention_stablehlo

    from deltaproduct_jax.layers import softmax

    found = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", found)
    softmax._is_taken_by_cudnn.cache_clear()
    yield
    softmax._is_taken_by_cudnn.cache_clear()
