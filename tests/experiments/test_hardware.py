"""What is run on GPUs only, on a CPU: FlashQLA's layouts, sums of kernels, cases of the check."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deltaproduct_jax.errors import ConfigError
from experiments.hardware import gpu_check
from experiments.lib import flags
from experiments.lib.bench import device_time, timing
from experiments.lib.bench.peers import fla, flashqla
from experiments.lib.bench.timing import BACKWARD, FORWARD, Compiled, Shape

NAMES = ("q", "k", "v", "g", "beta")


class Tensor:
    """As much of PyTorch's tensors as the peer's module uses, in NumPy."""

    def __init__(self, array):
        self.array = np.asarray(array, np.float64)
        self.shape = self.array.shape

    def new_zeros(self, *shape):
        return Tensor(np.zeros(shape))

    def __setitem__(self, index, x):
        self.array[index] = x.array

    def flatten(self, first, last):
        shape = self.shape
        return Tensor(self.array.reshape(*shape[:first], -1, *shape[last + 1 :]))

    def numpy(self):
        return self.array

    def to(self, dtype):
        assert dtype == "bfloat16"
        return self

    def requires_grad_(self, needed):
        assert needed
        return self

    contiguous = detach = float = cpu = lambda self: self


def one_factor(q, k, v, g, beta, cotangents=None):
    """The gated delta rule, and its gradients given cotangents; of arrays without factors."""
    factors = (x[:, :, None] for x in (k, v, beta))
    return oracle.delta_product(q, *factors, g, cotangents=cotangents)


@pytest.fixture
def flash_qla(monkeypatch):
    """Stand-ins for the package and for PyTorch: one factor a token, a gate always."""

    def rule(*, q, k, v, g, beta, output_final_state):
        assert output_final_state
        x = types.SimpleNamespace(q=q, k=k, v=v, g=g, beta=beta)
        return tuple(map(Tensor, one_factor(*(getattr(x, n).array for n in NAMES))))

    def grad(outputs, inputs, cotangents):
        assert [x.shape for x in outputs] == [x.shape for x in cotangents]
        named = dict(zip(order, (x.array for x in inputs), strict=True))
        found = one_factor(**named, cotangents=[x.array for x in cotangents])[2]
        found |= {name: found[name][:, :, 0] for name in ("k", "v", "beta")}
        return tuple(Tensor(found[name]) for name in order)

    order = ("q", "k", "v", "beta", "g")  # of the benchmark's arrays; a missing g is put last
    torch = types.SimpleNamespace(
        autograd=types.SimpleNamespace(grad=grad),
        bfloat16="bfloat16",
        cuda=types.SimpleNamespace(synchronize=lambda: None),
        zeros=lambda *shape, device: Tensor(np.zeros(shape)),
    )
    for module in (fla, flashqla):
        monkeypatch.setattr(module, "load_torch", lambda *_: torch)
    monkeypatch.setattr(flashqla, "to_torch", Tensor)
    package = types.SimpleNamespace(chunk_gated_delta_rule=rule)
    monkeypatch.setitem(sys.modules, "flash_qla", package)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("R", [1, 3])
def test_factors_are_interleaved_for_flashqla(R, gated, flash_qla):
    shape = Shape(B=2, T=5, H=2, K=4, V=3, R=R, gated=gated)
    arrays = {name: np.asarray(x, np.float64) for name, x in shape.inputs().items()}
    weights = [timing.cotangent(size) for size in ((2, 5, 2, 3), (2, 2, 4, 3))]
    o, state, gradients = oracle.delta_product(**arrays, cotangents=weights)
    found = flashqla.peer_results(shape, arrays, FORWARD)
    for x, y in zip(found, (o, state), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    found = flashqla.peer_results(shape, arrays, BACKWARD)
    assert found.keys() == arrays.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, gradients[name], atol=1e-12, err_msg=name)


def profile():
    """Two streams of a GPU; what shows the same again; the host."""

    def line(name, **nanoseconds):
        events = [types.SimpleNamespace(name=n, duration_ns=x) for n, x in nanoseconds.items()]
        return types.SimpleNamespace(name=name, events=events)

    gpu = [
        line("Stream #1(Compute)", walk=6e6, inverse=2e6),
        line("Stream #2(MemcpyD2D)", walk=2e6, copy=20e6),
        line("XLA Ops", walk=9e6),
    ]
    host = [line("Stream of the host", python=1e9)]
    planes = [("/device:GPU:0", gpu), ("/host:CPU", host)]
    planes = [types.SimpleNamespace(name=name, lines=lines) for name, lines in planes]
    return types.SimpleNamespace(planes=planes)


def test_kernels_are_summed_by_name_over_streams(monkeypatch):
    runs = []
    entry = Compiled(lambda: runs.append(1), 0.0, None, calls=2)
    assert device_time.kernel_times(entry) == {}  # not on a GPU
    assert not runs
    monkeypatch.setattr(device_time.jax, "default_backend", lambda: "gpu")
    data = types.SimpleNamespace(from_file=lambda path: profile())
    monkeypatch.setattr(device_time.jax.profiler, "ProfileData", data)
    monkeypatch.setattr(device_time.glob, "glob", lambda *_, **__: ["trace.xplane.pb"])
    monkeypatch.setattr(device_time.jax.profiler, "trace", jax.named_scope)
    found = device_time.time_on_device({"op": entry})["op"]
    assert found == {"copy": 1.0, "walk": 0.4, "inverse": 0.1}  # of one call: 10 runs, 2 calls each
    assert list(found) == ["copy", "walk", "inverse"]  # the longest first
    assert len(runs) == 1 + device_time.RUNS


SMALL = {"T": 17, "R": 2, "H": 1, "K": 8, "V": 4}


def test_cases_of_the_check_are_what_they_are_called():
    arrays = {
        kind: gpu_check.Case(**SMALL, kind=kind).arrays()
        for kind in ("random", "decay", "forgets", "never", "twos", "agree", "same")
    }
    assert (arrays["decay"]["g"] == -20).all()
    forgets = np.asarray(arrays["forgets"]["g"][0, :, 0])
    assert list(np.flatnonzero(forgets == -1e4)) == [0, 8, 16]
    assert (np.delete(forgets, [0, 8, 16]) > -20).all()
    assert list(np.flatnonzero(np.isneginf(arrays["never"]["g"][0, :, 0]))) == [0, 8, 16]
    for kind, beta in (("twos", True), ("agree", True), ("same", True), ("random", False)):
        assert bool((arrays[kind]["beta"] == 2).all()) is beta
    for kind, low, high in (("random", -1, 0.9), ("agree", 0.96, 0.998), ("same", 0.99, 1.01)):
        k = np.asarray(arrays[kind]["k"].astype(jnp.float32))[0, :, :, 0].reshape(-1, 8)
        np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1, atol=1e-2)
        assert low < np.median(k @ k.T) < high, kind
        assert bool((k == k[0]).all()) is (kind == "same")
    packed = gpu_check.Case(T=200, H=1, K=4, V=4, packed=True).arrays()["segment_ids"]
    assert packed.shape == (1, 200)
    assert 1 < len(np.unique(packed)) < 30
    assert gpu_check.Case(**SMALL, state=True).arrays()["initial_state"].shape == (1, 1, 8, 4)


def test_cases_can_be_named_on_a_command_line():
    given = [f"--cases={','.join(gpu_check.CASES)}"]
    found = flags.parse_fields(given, {"check": gpu_check.CheckConfig})["check"]["cases"]
    assert found == tuple(gpu_check.CASES)


@pytest.mark.parametrize(
    "refused",
    [{"cases": ("twos",)}, {"peer": "fla"}, {"gradients": 1}],
    ids=str,
)
def test_what_the_check_refuses(refused):
    with pytest.raises(ConfigError, match=next(iter(refused))):
        gpu_check.CheckConfig(**refused)


def test_the_check_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match=r"^gpu_check needs a GPU; JAX runs on cpu$"):
        gpu_check.command([f"--workdir={tmp_path}"])


@pytest.fixture
def by_chunks(monkeypatch):
    """The chunked form in place of the kernels; what it says of a single token is wrong."""
    right = gpu_check.delta_product

    def op(*, implementation, **arrays):
        if implementation == "recurrent":
            return right(**arrays, implementation=implementation)
        assert implementation == "triton"
        o, state = right(**arrays, implementation="chunked")
        return o * (1.5 if o.shape[1] == 1 else 1.0), state

    monkeypatch.setattr(gpu_check, "delta_product", op)
    kernels = types.SimpleNamespace(compute_capability=lambda: 90)
    monkeypatch.setattr(gpu_check.kernels, "load", lambda name: kernels)
    monkeypatch.setattr(gpu_check.gluon, "has_versions", lambda: True)
    monkeypatch.setattr(gpu_check, "require_gpu", lambda script: None)


@pytest.mark.slow
def test_the_check_shows_errors_and_kernels(by_chunks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.CASES, "narrow", {"T": 9, "K": 8, "V": 8, "packed": True})
    gpu_check.command([f"--workdir={tmp_path}", "--cases=one token,narrow"])
    wrong, right = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert (wrong["kernels"], right["kernels"]) == ("Gluon", "Triton")
    assert wrong["o"] == pytest.approx(0.5, abs=0.01)
    assert all(0 < x < 5e-3 for x in (right["o"], right["final_state"], wrong["final_state"]))
    assert f"| one token | Gluon | {wrong['o']:.1e} |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_check_shows_errors_of_gradients(by_chunks, tmp_path, monkeypatch, capsys):
    sizes = {"T": 9, "K": 8, "V": 8, "Hv": 4, "packed": True, "state": True}
    monkeypatch.setitem(gpu_check.CASES, "narrow", sizes)
    gpu_check.command([f"--workdir={tmp_path}", "--cases=narrow", "--gradients=true"])
    (row,) = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert row["kernels"] == "Triton"
    errors = [row[f"d{name}"] for name in gpu_check.GRADIENTS]
    assert all(0 < x < 1e-2 for x in errors)
    assert f"| {errors[-1]:.1e} |" in capsys.readouterr().out


def test_the_check_names_the_pieces(by_chunks):
    arrays = gpu_check.Case(T=1).arrays()
    assert gpu_check.kernels_of(gpu_check.Case(T=1), arrays) == "Gluon"
    pieces = gpu_check.cut.pieces_for(2, 64, R=1, gated=True, keeps=False)
    assert pieces > 1
    assert gpu_check.kernels_of(gpu_check.Case(T=4096), arrays) == f"Gluon, {pieces} pieces"
