"""Short convolutions of q, k and v with SiLU, and lengths of q and k: programs and inputs."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.compilers import child, tpu
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops.convolution.dispatch import short_convolution
from deltaproduct_jax.ops.convolution.plain import Form, unit
from deltaproduct_jax.ops.convolution.selection import PLAIN, Choice, Convolution, choose
from deltaproduct_jax.ops.precision import accumulator_dtype
from experiments.lib import environment
from experiments.lib.bench.peers.fla import as_compiled, load_torch, to_numpy, to_torch
from experiments.lib.bench.timing import FORWARD, Compiled
from experiments.lib.bench.tpu_compiler import EXTRA, figures_of
from experiments.lib.compilers import require_compiler

# As layers compute without a kernel: the convolution is rounded, then divided by lengths.
LAYER, FUSED, GPU_KERNEL, TPU_KERNEL = "plain", "fused", "triton", "pallas_tpu"
KERNELS = (GPU_KERNEL, TPU_KERNEL)
IMPLEMENTATIONS = (LAYER, FUSED, *KERNELS)
TIMEOUT_S = 600  # of a compilation
Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """Sizes of q's, k's and v's convolutions, by the letters of the op; W taps."""

    B: int
    T: int
    H: int
    K: int
    R: int
    W: int
    dtype: str
    packed: bool

    @property
    def channels(self) -> dict[str, int]:
        """Of each convolution; a product of matrices writes all of a token's along one axis."""
        factor = self.H * self.K
        return {"q": factor, "k": self.R * factor, "v": self.R * factor}

    def heads(self, name: str) -> tuple[int, ...]:
        """The same channels as the op takes them."""
        return (self.H, self.K) if name == "q" else (self.R, self.H, self.K)

    def inputs(self, seed: int = 0) -> dict[str, jax.Array]:
        """Inputs, taps, cotangents ("dq" and so on) of each, and "run", the segments."""
        keys = iter(jax.random.split(jax.random.key(seed), 9))
        arrays = {}
        for name, C in self.channels.items():
            draw = lambda *shape: jax.random.normal(next(keys), shape)
            arrays[name] = draw(self.B, self.T, C).astype(self.dtype)
            arrays[f"{name}_taps"] = draw(self.W, C) * self.W**-0.5
            dy = draw(self.B, self.T, *self.heads(name))
            arrays[f"d{name}"] = dy.astype(self.dtype)
        if self.packed:  # of a quarter of a row
            ids = jnp.arange(self.T, dtype=jnp.int32) * 4 // self.T
            arrays["run"] = jnp.broadcast_to(ids, (self.B, self.T))
        return arrays

    def floor_bytes(self, direction: str) -> int:
        """Of inputs and outputs, each moved once."""
        size = self.B * self.T * sum(self.channels.values()) * jnp.dtype(self.dtype).itemsize
        return size * (2 if direction == FORWARD else 5)


def layer_program(
    sizes: Convolutions, implementation: str, direction: str
) -> Callable[[Arrays], Any]:
    """q, k and v of `Convolutions.inputs`, and with the gradient those of inputs and taps.

    Raises:
        ValueError: the kernel cannot run these.
    """
    silu, K = jax.nn.silu, sizes.K
    choice = PLAIN
    if implementation in KERNELS:
        fixed = {"B": sizes.B, "T": sizes.T, "conv_size": sizes.W, "dtype": sizes.dtype}
        forms = {name: Form(silu, None if name == "v" else K) for name in sizes.channels}
        each = [Convolution(forms[name], C, K) for name, C in sizes.channels.items()]
        choice = choose(implementation, each, op=lambda _: implementation, **fixed)

    def forward(given: Arrays, run: jax.Array | None) -> dict[str, jax.Array]:
        return {name: _one(sizes, implementation, choice, name, given, run) for name in "qkv"}

    def backward(arrays: Arrays) -> Any:
        given = {n: x for n, x in arrays.items() if n in "qkv" or n.endswith("_taps")}
        outputs, pull = jax.vjp(lambda given: forward(given, arrays.get("run")), given)
        (gradients,) = pull({name: arrays[f"d{name}"] for name in "qkv"})
        return outputs, gradients

    if direction == FORWARD:
        return lambda arrays: forward(arrays, arrays.get("run"))
    return backward


def _one(
    sizes: Convolutions,
    implementation: str,
    choice: Choice,
    name: str,
    given: Arrays,
    run: jax.Array | None,
) -> jax.Array:
    u, taps = given[name], given[f"{name}_taps"]
    taps = taps.astype(accumulator_dtype(u.dtype))
    before = jnp.zeros((sizes.B, sizes.W - 1, *u.shape[2:]), u.dtype)
    past = None if run is None else jnp.zeros((sizes.B, sizes.W - 1), run.dtype)
    has_length = name != "v"
    within = has_length and implementation != LAYER
    form = Form(jax.nn.silu, sizes.K if within else None)
    y = short_convolution(choice, form, u, before, taps, run, past)
    y = y.reshape(*y.shape[:2], *sizes.heads(name))
    return unit(y, sizes.K).astype(y.dtype) if has_length and not within else y


def exact(sizes: Convolutions, arrays: Arrays, direction: str) -> Any:
    """What `program` computes, in float64."""
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(
            x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None
        )
        arrays = {name: jnp.asarray(wide(x)) for name, x in arrays.items()}
        return jax.device_get(jax.jit(layer_program(sizes, LAYER, direction))(arrays))


def peer_program(sizes: Convolutions, arrays: Arrays, direction: str) -> Callable[[], Any]:
    """The same by flash-linear-attention: its convolutions with SiLU, then its lengths.

    Raises:
        ConfigError: torch, the package or a GPU is missing, or rows are packed.
    """
    torch = load_torch()
    from fla.modules.convolution import causal_conv1d
    from fla.modules.l2norm import l2norm

    if sizes.packed:
        raise ConfigError("peer=fla packs rows in another way; give packed=false")
    given = {name: to_torch(x) for name, x in arrays.items()}
    inputs = {name: given[name] for name in "qkv"}
    inputs |= {f"{n}_taps": given[f"{n}_taps"].T.contiguous() for n in "qkv"}
    cotangents = [given[f"d{name}"] for name in "qkv"]
    for x in inputs.values() if direction != FORWARD else ():
        x.requires_grad_(True)

    def forward() -> list[Any]:
        outputs = []
        for name in "qkv":
            y, _ = causal_conv1d(inputs[name], inputs[f"{name}_taps"], activation="silu")
            y = y.view(*given[f"d{name}"].shape)
            outputs.append(y if name == "v" else l2norm(y, eps=1e-6))
        return outputs

    def run() -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        outputs = forward()
        results = dict(zip("qkv", outputs, strict=True))
        if direction != FORWARD:
            gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
            results = results, dict(zip(inputs, gradients, strict=True))
        torch.cuda.synchronize()
        return results

    return run


def peer_results(sizes: Convolutions, arrays: Arrays, direction: str) -> Any:
    """What the peer computes, arranged as `program` has it; raises as `peer_program`."""
    got = peer_program(sizes, arrays, direction)()
    numbers = lambda named: dict(zip(named, to_numpy(tuple(named.values())), strict=True))
    if direction == FORWARD:
        return numbers(got)
    outputs, gradients = map(numbers, got)
    turned = {n: x.T if n.endswith("_taps") else x for n, x in gradients.items()}
    return outputs, {n: x.reshape(arrays[n].shape) for n, x in turned.items()}


def compile_peer(sizes: Convolutions, arrays: Arrays, direction: str) -> Compiled:
    """The peer's program, compiled by a first run; raises as `peer_program`."""
    return as_compiled(peer_program(sizes, arrays, direction))


def compile_here(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles one program for a TPU in this process, which must have been started for it.

    Args:
        fields: "generation", "implementation", "direction", the fields of `Convolutions`, and the
            folder "code", where the compiler of this process writes the code of kernels.

    Returns:
        Bytes through HBM, bundles that kernels issue, cycles of the cost model, and what
        `memory_of` gives.
    """
    fields = dict(fields)
    generation, implementation, direction, code = (
        fields.pop(name) for name in ("generation", "implementation", "direction", "code")
    )
    sizes = Convolutions(**fields)
    run = layer_program(sizes, implementation, direction)
    found = figures_of(generation, lambda: (run, (jax.eval_shape(sizes.inputs),)), Path(code))
    kept = ("model_cycles", "kernel_cycles")
    return {name: found[name] for name in found if name in kept or name.endswith("_bytes")}


def estimates(
    sizes: Convolutions,
    generation: str,
    implementations: Sequence[str],
    directions: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """What the compiler of a TPU that is not there makes of each, one after the other.

    Raises:
        ConfigError: libtpu is missing, or the compiler ends without a program.
    """
    require_compiler("tpu")
    fixed = dataclasses.asdict(sizes) | {"generation": generation}
    for direction, implementation in itertools.product(directions, implementations):
        names = {"generation": generation, "direction": direction, "implementation": implementation}
        with tempfile.TemporaryDirectory(prefix="tpu_code_") as code:
            found, ending = child.call_apart(  # each apart: together they may take too much memory
                f"{__name__}:{compile_here.__name__}",
                [fixed | names | {"code": code}],
                folder=environment.ROOT,
                environment=tpu.child_environment(EXTRA, code_folder=code),
                timeout_s=TIMEOUT_S,
            )
        if ending is not None:
            raise ConfigError(f"{direction} of {implementation}: the compiler {ending}")
        floor, (row,) = sizes.floor_bytes(direction), found
        row |= {"floor_bytes": floor, "times_floor": row["hbm_bytes"] / floor}
        yield names | row
