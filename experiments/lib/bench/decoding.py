"""How long a token takes that a model writes, and training beside it, in one process."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.measuring.throughput import Throughput
from experiments.lib.bench.timing import Compiled, time_in_turn
from experiments.lib.bench.training_steps import Row, our_rows


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is written: rows at a time, in turn, and tokens of each."""

    rows: Sequence[int]
    tokens: int


def trained_and_decoded(
    training: TrainConfig,
    model_config: ModelConfig,
    tokens: np.ndarray,
    steps: int,
    repeats: int,
    budget_s: float,
    decoding: Decoding,
) -> list[Row]:
    """A row of `our_rows`, with speed, utilisation and the time of a token written.

    Beside what `our_rows` gives, ``tokens_per_s``, ``mfu`` (None where the chip's peak is not
    known) and ``decoding_ms``, milliseconds by the number of rows written at a time.
    """
    (row,) = our_rows(training, model_config, tokens, steps, repeats, budget_s)
    speed = 1e3 * (tokens.size - len(tokens)) / row["median_ms"]
    throughput = Throughput(1, jax.devices()[0].device_kind, row["parameters"])
    # Who writes keeps parameters in the dtype that they are used in.
    written = dataclasses.replace(model_config, param_dtype=model_config.dtype)
    took = {rows: decoding_ms(written, rows, decoding.tokens, repeats) for rows in decoding.rows}
    more = {"tokens_per_s": speed, "mfu": throughput.utilisation(speed), "decoding_ms": took}
    return [row | more]


def decoding_ms(config: ModelConfig, rows: int, tokens: int, repeats: int) -> float:
    """Milliseconds of one token of ``rows`` texts, the likeliest each time; the median of rounds.

    Args:
        config: of the model, whose parameters are drawn.
        rows: texts at the same time.
        tokens: of one program.
        repeats: timed rounds, after one that warms up.
    """
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def write(params: Any, state: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        model = nnx.merge(graph, params)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            state, token = carry
            logits, state = model.step(state, token)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (state, token), token

        (state, _), written = jax.lax.scan(step, (state, first), None, length=tokens)
        return state, written

    arguments = params, model.init_state(rows), jnp.zeros(rows, jnp.int32)
    began = time.perf_counter()
    compiled = jax.jit(write).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    run = lambda: jax.block_until_ready(compiled(*arguments))
    entry = Compiled(run, seconds, memory_of(compiled)["temp_bytes"], tokens)
    time_in_turn({"write": entry}, repeats, budget_s=60.0)
    return entry.summary()["median_ms"]
