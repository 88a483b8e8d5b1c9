"""What several test files share: inputs, ways to run the op, its errors, a script's refusals."""

import collections
import dataclasses
import functools
import importlib
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.ops import delta_product

IMPLEMENTATIONS = ("recurrent", "associative", "chunked")
# Kernels of other platforms, where a CPU interprets them.
WITH_KERNELS = (*IMPLEMENTATIONS, "pallas_tpu")
ARGUMENTS = ("q", "k", "v", "beta", "g", "initial_state")

# (implementation, dtype) -> {"outputs" | "gradients": worst relative error}; printed at the end.
WORST = collections.defaultdict(lambda: {"outputs": 0.0, "gradients": 0.0, "cases": 0})


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and kinds of inputs; ``arrays`` draws them in float64."""

    T: int
    R: int = 2
    B: int = 2
    H: int = 2
    G: int = 1
    K: int = 8
    V: int = 8
    gate: str | None = "mild"
    beta: tuple[float, float] = (0.0, 2.0)
    keys: str = "unit"
    state: bool = True
    segments: bool = False
    scale: float | None = None
    l2norm: bool = False
    chunk_size: int | None = None
    seed: int = 0

    @property
    def tame(self) -> bool:
        """Errors of the state die out: it is gated, or beta stays at or below 1."""
        return self.gate is not None or self.beta[1] <= 1

    def arrays(self) -> dict[str, np.ndarray | None]:
        rng = np.random.default_rng(self.seed)
        B, T, R, H, K, V = self.B, self.T, self.R, self.H, self.K, self.V
        Hv = H * self.G
        k = _keys(rng, (B, T, R, H, K), self.keys)
        return {
            "q": rng.normal(size=(B, T, H, K)),
            "k": k * rng.uniform(0.5, 2, size=(*k.shape[:-1], 1)) if self.l2norm else k,
            "v": rng.normal(size=(B, T, R, Hv, V)),
            "beta": rng.uniform(*self.beta, size=(B, T, R, Hv)),
            "g": _gates(rng, (B, T, Hv), self.gate),
            "initial_state": rng.normal(size=(B, Hv, K, V)) if self.state else None,
        }

    def segment_ids(self) -> np.ndarray | None:
        """Segments of random lengths; ids return, so that a change and not a value must count."""
        if not self.segments:
            return None
        rng = np.random.default_rng(self.seed + 1)
        return np.cumsum(rng.uniform(size=(self.B, self.T)) < 0.15, axis=1) % 2


def _keys(rng, shape, kind):
    if kind == "identical":
        k = np.broadcast_to(rng.normal(size=shape[-1]), shape)
    elif kind == "parallel":  # cosine of about .9999
        k = rng.normal(size=shape[-1]) + 0.014 * rng.normal(size=shape)
    else:
        k = rng.normal(size=shape)
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def _gates(rng, shape, kind):
    if kind is None:
        return None
    position = np.broadcast_to(np.arange(shape[1])[None, :, None], shape)
    return {
        "mild": lambda: -rng.uniform(0, 0.3, size=shape),
        "slow": lambda: -rng.uniform(1e-3, 1e-2, size=shape),
        "zero": lambda: np.zeros(shape),
        "strong": lambda: np.full(shape, -20.0),
        "every8": lambda: np.where(position % 8 == 7, -20.0, -0.01),
        "extreme": lambda: np.where(position % 5 == 3, -1e4, -0.1),
        "mixed": lambda: rng.choice([0.0, -0.5, -20.0, -1e4], size=shape),
    }[kind]()


def cast(arrays, dtype):
    """Inputs in ``dtype``, the state in float32 (float64 for float64)."""
    wide = np.float64 if dtype == "float64" else np.float32
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return {
        name: None if x is None else x.astype(wide if name == "initial_state" else dtype)
        for name, x in arrays.items()
    }


def draw_cotangents(arrays, seed=99):
    rng = np.random.default_rng(seed)
    B, T, _, Hv, V = arrays["v"].shape
    K = arrays["q"].shape[-1]
    return rng.normal(size=(B, T, Hv, V)), rng.normal(size=(B, Hv, K, V))


def outputs_and_gradients(arrays, segment_ids, cotangents, options):
    """``(o, final_state)`` and the gradients of all arrays, for the given cotangents."""

    def run(arrays):
        return delta_product(**arrays, segment_ids=segment_ids, **dict(options))

    outputs, pullback = jax.vjp(run, arrays)
    cotangents = tuple(
        jnp.asarray(c).astype(x.dtype) for c, x in zip(cotangents, outputs, strict=True)
    )
    return outputs, pullback(cotangents)[0]


_quick = jax.jit(outputs_and_gradients, static_argnames=("options",))
# XLA's own defaults, where conftest.py turns most optimisation off.
_DEFAULTS = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    _DEFAULTS["xla_cpu_use_fusion_emitters"] = True
_optimised = jax.jit(
    outputs_and_gradients,
    static_argnames=("options",),
    compiler_options=_DEFAULTS,
)


def run(arrays, cotangents, *, segment_ids=None, optimised=False, **options):
    """Runs the op and its gradient; returns (o, final_state) and a dict of gradients as NumPy."""
    with jax.enable_x64(arrays["q"].dtype == np.float64):
        outputs, gradients = (_optimised if optimised else _quick)(
            arrays, segment_ids, cotangents, tuple(sorted(options.items()))
        )
    wide = functools.partial(np.asarray, dtype=np.float64)
    gradients = {name: wide(x) for name, x in gradients.items() if x is not None}
    return tuple(wide(x) for x in outputs), gradients


def options_of(case: Case, implementation):
    options = {"scale": case.scale, "use_qk_l2norm": case.l2norm}
    if implementation == "chunked":
        options["chunk_size"] = case.chunk_size
    return {**options, "implementation": implementation}


def relative_error(x, reference):
    """||x - reference|| / ||reference||, where a zero reference allows 1e-30 in absolute terms."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape
    difference = np.linalg.norm(x - reference)
    if difference <= 1e-30:
        return 0.0
    return difference / max(np.linalg.norm(reference), 1e-30)


def errors(case: Case, implementation, dtype, *, optimised=False, **overrides):
    """Relative errors against the oracle: of o and final_state, and of each gradient, by name.

    ``optimised`` compiles the op as people run it, which takes three times as long.
    """
    arrays = cast(case.arrays(), dtype)
    do, dfinal = draw_cotangents(arrays)
    # Both sides get the same cotangent, so it is rounded to the dtype of the output first.
    cotangents = (
        cast({"do": do}, dtype)["do"],
        cast({"initial_state": dfinal}, dtype)["initial_state"],
    )
    segment_ids = case.segment_ids()
    reference = oracle.delta_product(
        **arrays,
        scale=case.scale,
        use_qk_l2norm=case.l2norm,
        segment_ids=segment_ids,
        cotangents=cotangents,
    )
    options = {**options_of(case, implementation), **overrides}
    outputs, gradients = run(
        arrays, cotangents, segment_ids=segment_ids, optimised=optimised, **options
    )
    if case.state is False:
        reference[2].pop("initial_state")
    assert gradients.keys() == reference[2].keys()
    of_outputs = {
        name: relative_error(x, y)
        for name, x, y in zip(("o", "final_state"), outputs, reference[:2], strict=True)
    }
    of_gradients = {f"d{n}": relative_error(gradients[n], reference[2][n]) for n in gradients}
    return of_outputs, of_gradients


def record(implementation, dtype, of_outputs, of_gradients):
    """Keeps the worst errors for the table at the end of the session."""
    worst = WORST[implementation, dtype]
    worst["cases"] += 1
    worst["outputs"] = max([worst["outputs"], *of_outputs.values()])
    worst["gradients"] = max([worst["gradients"], *of_gradients.values()])


def plain_bfloat16_error(case: Case) -> float:
    """Error of o when the plain recurrence rounds the operands of every dot to bfloat16."""

    def rounded(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)

    arrays = cast(case.arrays(), "bfloat16")
    reference, _ = oracle.delta_product(**arrays, segment_ids=case.segment_ids())
    assert not case.segments
    assert not case.l2norm
    q, k, v, beta = (np.asarray(arrays[n], np.float64) for n in ("q", "k", "v", "beta"))
    q, k = np.repeat(q, case.G, axis=2), np.repeat(k, case.G, axis=3)
    B, T, R, Hv, V = v.shape
    S = np.zeros((B, Hv, case.K, V))
    if case.state:
        S = arrays["initial_state"].astype(np.float64)
    o = np.zeros((B, T, Hv, V))
    for t in range(T):
        if arrays["g"] is not None:
            S = S * np.exp(arrays["g"][:, t].astype(np.float64))[..., None, None]
        for r in range(R):
            prediction = np.einsum("bhkv,bhk->bhv", rounded(S), k[:, t, r])
            write = rounded(beta[:, t, r, :, None] * (v[:, t, r] - prediction))
            S = S + k[:, t, r, :, :, None] * write[..., None, :]
        o[:, t] = case.K**-0.5 * np.einsum("bhkv,bhk->bhv", rounded(S), q[:, t])
    return relative_error(o, reference)


def refusal(script, argv, errors=(ConfigError, RunDirectoryError)):
    """The text of the error in which a script of `experiments` ends."""
    module = importlib.import_module(f"experiments.{script}")
    command = getattr(module, "command", None) or module.EXPERIMENT.command
    with pytest.raises(errors) as caught:
        command(argv)
    return str(caught.value)
