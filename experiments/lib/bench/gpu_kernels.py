"""What a pass of the GPU kernels launches, without launching it, and what each cannot go below."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.cut import default_span
from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.settings import check_fields, setting, whole_number

# Where q and scores stand among the arrays of a walk, whose summary has no output.
UNREAD = (0, 5)
# Of an H100: bytes and bfloat16 operations per second.
BANDWIDTH, PEAK = 3.35e12, 989e12


@dataclasses.dataclass(frozen=True)
class PassConfig:
    """Shapes of a forward and a backward pass."""

    batch_size: int = setting(8, "sequences B", least=1)
    length: int = setting(4096, "tokens T", least=1)
    num_heads: int = setting(16, "heads H", least=1)
    head_dim: tuple[int, ...] = setting(
        (64, 128, 256), "key width K and value width V, in turn", filled=True, least=1
    )
    num_householder: tuple[int, ...] = setting(
        (1, 2, 3), "Householder factors per token, in turn", filled=True, least=1
    )
    dtype: str = setting(
        "bfloat16",
        "of q, k and v: float32, float16 or bfloat16",
        one_of=("bfloat16", "float16", "float32"),
    )
    gated: bool = setting(True, "with a decay g")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)

    def described(self) -> str:
        """The shape in words, but for what is taken in turn."""
        gated = "gated" if self.gated else "ungated"
        return f"B={self.batch_size} T={self.length} H={self.num_heads}, {self.dtype}, {gated}"


class KernelCall(NamedTuple):
    """What `passes.call` is given."""

    name: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    outs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    launch: Launch
    meta: dict[str, Any]


def launches(config: PassConfig, R: int, K: int) -> list[KernelCall]:
    """Every launch of a forward and a backward pass, in order. Nothing is run.

    Raises:
        ConfigError: a package is missing, or the kernels do not take the shape.
    """
    reason = kernels.reason_against(
        "triton",
        **{"dtype": config.dtype, "B": config.batch_size, "T": config.length, "R": R, "K": K},
        **{"V": K, "H": config.num_heads, "Hv": config.num_heads, "precision": None},
    )
    if reason is not None:
        raise ConfigError(f"implementation triton cannot run R={R}, K=V={K}: {reason}")
    recorded, call = [], passes.call

    def record(name, arrays, outs, grid, launch, *, meta):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        recorded.append(KernelCall(name, shapes, tuple(outs), grid, launch, meta))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outs)

    passes.call = record
    try:
        _trace(config, R, K)
    finally:
        passes.call = call
    return recorded


def _trace(config: PassConfig, R: int, K: int) -> None:
    B, T, H = config.batch_size, config.length, config.num_heads
    dtype = jnp.dtype(config.dtype)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    g = array(B, T, H, dtype=jnp.float32) if config.gated else None
    tokens = Tokens(array(B, T, H, K), *2 * (array(B, T, R, H, K),), array(B, T, R, H), g, None)
    state = array(B, H, K, K, dtype=jnp.float32)
    spans = -(-T // default_span(dtype, T=T, R=R, K=K, V=K))
    options = kernels.Options(K**-0.5, None, spans, interpret=False, known_finite=True)
    options = options._replace(more=bool(passes.kept_more(tokens, options)))

    def both(tokens, state, do):
        _, _, states = passes.forward(tokens, state, options, keep_states=True)
        return passes.backward(tokens, states, do, state, options)

    jax.eval_shape(both, tokens, state, array(B, T, H, K))


def floors(name: str, arrays, grid, meta) -> dict[str, float]:
    """Bytes and operations, in all programs, and the two times that they cannot go below.

    A summary's bytes are those of all pieces, though it has nothing to do with the last.
    """
    is_summary = meta.get("SUMMARY", False)
    unread = UNREAD if name == "walk" and is_summary else ()
    read = [x for index, x in enumerate(arrays) if index not in unread]
    size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in read)
    programs = math.prod(grid)
    if is_summary:  # nothing of the last piece, and no map of the first
        ends = -(-meta["V"] // meta["BV"])
        programs = (ends * (grid[1] - 1) + (grid[0] - ends) * (grid[1] - 2)) * grid[2]
    steps = {"walk": "STEPS", "walk_back": "STEPS", "errors": "SPAN"}.get(name)
    if name == "errors" and meta["NARROW"]:
        steps = None
    products = _products(name, meta) * (meta[steps] if steps else 1) * programs
    return {
        "bytes": size,
        "operations": 2 * products,
        "floor_bytes_ms": 1e3 * size / BANDWIDTH,
        "floor_operations_ms": 1e3 * 2 * products / PEAK,
    }


def _products(name: str, meta) -> int:
    """Multiplications of a chunk in one program, of tiles as they are, padding included."""
    M, C, K = meta["M"], meta["CP"], meta["BK"]
    V = meta.get("BV", 0)
    if name == "prepare":  # grams, and the series in float32
        return M * M * K + C * M * K + M**3 // 2
    if name == "compose":
        return (meta["PIECES"] - 2) * K * K * V
    X = (1 + meta["TWO"]) * M * M
    if name == "walk":
        return 2 * M * K * V + X * V + (0 if meta["SUMMARY"] else C * K * V + C * M * V)
    if name == "errors":
        return (1 if meta["NARROW"] else 2) * M * K * V + X * V
    if name == "walk_back":
        return 2 * M * K * V + X * V + C * K * V + C * M * V
    V = meta["V"]  # gradients
    # With gates what spans tokens is made first; of one update a token the keys have nothing else.
    of_scores, of_keys = 2 * C * M * K, 2 * M * M * K
    grams = of_scores + of_keys
    if meta["HAS_G"]:
        grams += of_scores + (of_keys if meta["R"] > 1 else 0)
    return C * M * V + M * M * V + C * K * V + 2 * M * K * V + grams


def as_launch(text: str) -> Launch:
    """Of warps:stages:columns, or warps:stages:columns:keys.

    Raises:
        ConfigError: it is something else.
    """
    sizes = list(map(whole_number, text.split(":")))
    is_launch = None not in sizes and len(sizes) in (3, 4)
    if not is_launch or any(n < 1 or n & (n - 1) for n in sizes[:1] + sizes[2:]):
        raise ConfigError(
            f"variants={text!r} is not warps:stages:columns or warps:stages:columns:keys, such as "
            "4:2:64; all but the stages are powers of two"
        )
    return Launch(*sizes)


def call_of(config: PassConfig, R: int, K: int, kernel: str, launch: Launch | None):
    """The call of a kernel as the tiling launches it, or by ``launch``."""
    tiling_for = tiling.tiling_for

    def changed(*args, **sizes):
        tiles = tiling_for(*args, **sizes)
        return dataclasses.replace(tiles, **{kernel: launch}) if launch else tiles

    tiling.tiling_for = changed
    try:
        calls = [call for call in launches(config, R, K) if call.name == kernel]
    finally:
        tiling.tiling_for = tiling_for
    return calls[-1]  # after those of a summary


def time_call(call: KernelCall, repeats: int) -> tuple[float, float]:
    """Least and most of three means over ``repeats`` calls, in milliseconds."""

    def random(i: int, x: jax.ShapeDtypeStruct):
        # Small, so that nothing overflows on its way through the chunks.
        return (0.05 * jax.random.normal(jax.random.key(i), x.shape)).astype(x.dtype)

    arrays = [jax.jit(random, static_argnums=(1,))(i, x) for i, x in enumerate(call.arrays)]

    @jax.jit
    def run(arrays):
        return passes.call(call.name, arrays, call.outs, call.grid, call.launch, meta=call.meta)

    jax.block_until_ready([run(arrays) for _ in range(2)])
    means = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeats):
            results = run(arrays)
        jax.block_until_ready(results)
        means.append(1e3 * (time.perf_counter() - began) / repeats)
    return min(means), max(means)
