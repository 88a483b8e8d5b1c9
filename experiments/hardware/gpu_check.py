"""Are the kernels of a GPU right there? Each case against the recurrence in float64, on the GPU.

    python -m experiments.hardware.gpu_check --workdir=runs/gpu_check
    python -m experiments.hardware.gpu_check --workdir=runs/gpu_check --peer=flashqla
    python -m experiments.hardware.gpu_check --workdir=runs/gpu_check --gradients=true

runs `delta_product(implementation="triton")` forward in bfloat16, as it is called in inference, and
shows the relative errors of outputs and final states, and which kernels ran. The first cases are of
shapes: few and many tokens, factors, grouped heads, packing, widths, pieces. The others are of what
is hard to compute: 2048 tokens, 4 heads, from a state of zeros. With a peer, FlashQLA's errors
stand beside those with one factor.

Source: this project.
Expect: 3e-3 where beta is random or something is forgotten; more with beta = 2 throughout and no
decay, most with identical keys, since all bfloat16 products drift there.
Takes: two minutes on an H200, mostly compiling.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops import delta_product, kernels
from deltaproduct_jax.ops.kernels.gluon import cut
from deltaproduct_jax.ops.kernels.gluon import passes as gluon
from deltaproduct_jax.ops.kernels.triton import narrow
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, known_columns, shown, write_report
from experiments.lib.bench.timing import FORWARD, Shape, cotangent, machine, require_gpu

# Of more heads the gradient of the recurrence in float64 keeps more states than there is room for.
LONG = {"T": 2048, "H": 4}
NARROW = {"T": 100, "B": 256, "H": 4, "K": 32, "V": 32}
CASES = {
    "one token": {"T": 1},
    "63 tokens with n_h = 2": {"T": 63, "R": 2, "B": 2},
    "65 tokens and grouped heads": {"T": 65, "Hv": 4, "gated": False},
    "packed and grouped with n_h = 3": {"T": 200, "R": 3, "Hv": 4, "packed": True},
    "n_h = 5": {"T": 130, "R": 5},
    "packed with n_h = 8": {"T": 130, "R": 8, "gated": False, "packed": True},
    "64 x 128 and packed": {"T": 200, "R": 2, "K": 64, "packed": True},
    "128 x 64": {"T": 200, "R": 2, "V": 64},
    "64 x 64": {"T": 200, "K": 64, "V": 64},
    "narrow heads with n_h = 4": {**NARROW, "R": 4, "gated": False},
    "narrow heads packed and grouped with n_h = 3": {**NARROW, "R": 3, "Hv": 8, "packed": True},
    "in pieces and packed": {"T": 4096, "packed": True},
    "in pieces with n_h = 3 and no gates": {"T": 2100, "R": 3, "gated": False},
    "from a state with n_h = 2": {"T": 300, "R": 2, "Hv": 4, "state": True},
    "in pieces from a state": {"T": 2100, "state": True},
    "in pieces with slow gates and n_h = 2": {"T": 2100, "R": 2, "kind": "slow"},
    "in two pieces with n_h = 2": {"T": 600, "R": 2, "B": 12, "H": 4, "state": True},
    "in two pieces without gates": {"T": 600, "B": 12, "H": 4, "gated": False},
    "in three pieces with slow gates": {"T": 800, "B": 20, "kind": "slow"},
    "every other group of 64 strong": {"T": 2100, "R": 2, "kind": "by turns"},
    "random": LONG,
    "random with n_h = 2": {**LONG, "R": 2},
    "g = -20": {**LONG, "kind": "decay"},
    "g = -1e4 now and then": {**LONG, "kind": "forgets"},
    "g = -inf now and then with n_h = 3": {**LONG, "R": 3, "kind": "never"},
    "beta = 2": {**LONG, "gated": False, "kind": "twos"},
    "beta = 2 and keys agree to .99": {**LONG, "gated": False, "kind": "agree"},
    "beta = 2 and identical keys": {**LONG, "gated": False, "kind": "same"},
    "64k tokens": {"T": 65536, "H": 1},
}


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """What is held against float64."""

    peer: str | None = setting(None, "flashqla, or none", one_of=("flashqla",))
    cases: tuple[str, ...] = setting(
        tuple(CASES), f"some of {', '.join(CASES)}", filled=True, one_of=CASES
    )
    gradients: bool = setting(False, "those of every input too")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and kind of a case."""

    T: int
    R: int = 1
    B: int = 1
    H: int = 2
    K: int = 128
    V: int = 128
    Hv: int | None = None
    gated: bool = True
    packed: bool = False
    state: bool = False
    kind: str = "random"

    def shape(self) -> Shape:
        """The same for the benchmarks."""
        sizes = (self.B, self.T, self.H, self.K, self.V, self.R)
        return Shape(*sizes, "bfloat16", self.gated, self.Hv)

    def arrays(self) -> dict[str, jax.Array]:
        """Inputs: those of the benchmarks, changed to what the case is about."""
        arrays = self.shape().inputs()
        if self.kind in ("twos", "agree", "same"):
            arrays["beta"] = jnp.full_like(arrays["beta"], 2.0)
        if self.kind in ("agree", "same"):
            k = arrays["k"].astype(jnp.float32)
            # Two of length 1 that share one direction, and .1 of their own, agree to .99.
            k = k[:, :1, :1, :1] + (0.1 if self.kind == "agree" else 0.0) * k
            arrays["k"] = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(jnp.bfloat16)
        if self.kind == "slow":
            arrays["g"] *= 0.01
        if self.kind == "by turns":
            is_strong = (jnp.arange(self.T) // 64 % 2 == 1)[None, :, None]
            arrays["g"] = jnp.where(is_strong, 10 * arrays["g"], arrays["g"])
        if self.kind == "decay":
            arrays["g"] = jnp.full_like(arrays["g"], -20.0)
        if self.kind in ("forgets", "never"):
            every = (jnp.arange(self.T) % 8 == 0)[None, :, None]
            least = -1e4 if self.kind == "forgets" else -jnp.inf
            arrays["g"] = jnp.where(every, least, arrays["g"])
        if self.state:
            shape = (self.B, self.Hv or self.H, self.K, self.V)
            arrays["initial_state"] = jax.random.normal(jax.random.key(2), shape)
        if self.packed:
            starts = jax.random.bernoulli(jax.random.key(1), 0.03, (self.B, self.T))
            arrays["segment_ids"] = jnp.cumsum(starts, axis=1)
        return arrays


GRADIENTS = ("q", "k", "v", "beta", "g", "initial_state")


def row_of(name: str, config: CheckConfig) -> dict[str, Any]:
    """Errors of one case."""
    case = Case(**CASES[name])
    arrays = case.arrays()
    run = _both_ways if config.gradients else _forward
    with jax.enable_x64(True):
        wide = {
            key: x if key == "segment_ids" else jnp.asarray(np.asarray(x, np.float64))
            for key, x in arrays.items()
        }
        want = jax.device_get(jax.jit(functools.partial(run, "recurrent"))(wide))
    got = jax.device_get(jax.jit(functools.partial(run, "triton"))(arrays))
    row = {"case": name, "kernels": kernels_of(case, arrays, config.gradients)}
    row |= {key: _error(got[key], want[key]) for key in want}
    if config.peer and case.R == 1 and case.T == LONG["T"]:
        from experiments.lib.bench.peers import flashqla

        theirs = flashqla.peer_results(case.shape(), arrays, FORWARD)
        row["peer"] = _error(theirs[0], want["o"])
    return row


def _forward(implementation: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Outputs and final state."""
    results = delta_product(**arrays, implementation=implementation)
    return dict(zip(("o", "final_state"), results, strict=True))


def _both_ways(implementation: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same, and the gradients of a weighted sum of both."""
    fixed = {key: x for key, x in arrays.items() if key not in GRADIENTS}

    def run(some):
        return _forward(implementation, some | fixed)

    some = {key: arrays[key] for key in GRADIENTS if key in arrays}
    results, pull = jax.vjp(run, some)
    weights = {key: cotangent(x.shape).astype(x.dtype) for key, x in results.items()}
    return results | {f"d{key}": x for key, x in pull(weights)[0].items()}


def kernels_of(case: Case, arrays: dict[str, jax.Array], gradients: bool = False) -> str:
    """Those that `delta_product` chose, forward or for gradients."""
    named = [arrays[name] for name in ("q", "k", "v", "beta")]
    tokens = Tokens(*named, arrays.get("g"), arrays.get("segment_ids"))
    # As many slots for states as there are updates are enough for any of them.
    options = kernels.Options(1.0, None, case.T * case.R, interpret=False)
    if narrow.takes(tokens, options):
        return "of narrow heads"
    capability = kernels.load("triton").compute_capability()
    takes = gluon.takes_gradients if gradients else gluon.takes
    if not takes(tokens, options, capability):
        return "Triton"
    groups = -(-case.T // gluon.GROUP)
    how = {"R": case.R, "gated": case.gated or case.packed, "keeps": gradients}
    pieces = cut.pieces_for(case.B * (case.Hv or case.H), groups, **how)
    return "Gluon" if pieces == 1 else f"Gluon, {pieces} pieces"


def _error(x: Any, ref: Any) -> float:
    x, ref = np.asarray(x, np.float64), np.asarray(ref, np.float64)
    difference = np.linalg.norm(x - ref)
    return float(difference / np.linalg.norm(ref)) if np.any(ref) else float(difference)


def command(argv: Sequence[str]) -> None:
    """Prints the table, writes check.json and check.md."""
    parsed = flags.parse(argv, {"check": CheckConfig}, {"default": {}})
    config = CheckConfig(**parsed.sections["check"])
    require_gpu("gpu_check")
    rows = []
    for name in config.cases:
        rows.append(row_of(name, config))
        print(rows[-1], file=sys.stderr, flush=True)
    record = begun("hardware.gpu_check", argv, machine=machine(), rows=rows)
    print(write_report(parsed.workdir, "check", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What check.md holds."""
    columns = {"o": "o", "final_state": "final state"}
    columns |= {f"d{key}": f"d{key}".replace("_", " ") for key in GRADIENTS}
    columns["peer"] = "FlashQLA, o"
    lines = [
        [row["case"], row["kernels"], *(shown(row.get(key), ".1e") for key in columns)]
        for row in record["rows"]
    ]
    about = f"Relative errors against float64; {record['machine']}."
    return [about, known_columns(("case", "kernels", *columns.values()), lines)]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
