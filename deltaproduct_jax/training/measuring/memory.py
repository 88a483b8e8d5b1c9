"""Whether a run fits into memory at all: what it certainly needs, against what there is."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.step import TrainState

# Limits that a container sets, by the version of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# How XLA's errors begin where memory is short.
EXHAUSTED = "RESOURCE_EXHAUSTED"


def require_memory_of_config(config: RunConfig) -> None:
    """Raises ConfigError, naming the fields, if a run needs more memory than there is.

    Counted is only what no compiler can leave out, and without making a model, which of many layers
    takes long: the MLPs' weights, and the logits in float32 that exist at once at each length.
    """
    model, task, train = config.model, config.task, config.train
    weights = 3 * model.num_layers * model.hidden_size * model.mlp_width
    layers = f"num_layers={model.num_layers} and hidden_size={model.hidden_size}"
    # With their gradient and the optimiser's two moments, in float32 whatever the model holds.
    _require(layers, 4 * weights * 4)
    vocab_bytes = model.vocab_size * 4
    rows = train.batch_size // train.accumulation_steps
    at_once = lambda tokens: min(tokens, train.loss_chunk_size or tokens) * vocab_bytes
    lengths = f"train_length={task.train_length} and batch_size={train.batch_size}"
    _require(lengths, at_once(rows * task.train_length))
    for length in sorted({*task.test_lengths, config.select_length}):
        what = f"{config.evaluated_by(length)}={length} and eval_batch_size={train.eval_batch_size}"
        _require(what, at_once(train.eval_batch_size * length))


def require_memory_of_state(state: TrainState) -> None:
    """Raises ConfigError if ``state``, of which only the shapes are looked at, does not fit."""
    require_memory_of("parameters of this size", (state, state.params))  # gradients too


def require_memory_of(what: str, shapes: Any) -> None:
    """Raises ConfigError, naming ``what``, if arrays of these shapes do not fit."""
    _require(what, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)))


def within_memory(lowered: jax.stages.Lowered, what: str) -> jax.stages.Compiled:
    """Compiles a program; ConfigError, naming ``what``, if it needs more memory than there is.

    Counted is what the compiler has set aside for it on every device, by its own account.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise ConfigError(f"{what}, does not fit into memory: {first_line(error)}") from error
    account = compiled.memory_analysis()
    if account is not None:
        _require(f"{what},", jax.device_count() * account.temp_size_in_bytes, verb="needs")
    return compiled


def training_sizes(config: RunConfig) -> str:
    """The settings that the memory of a training step depends on, besides the model's."""
    train, lengths = config.train, f"train_length={config.task.train_length}"
    if train.curriculum:
        lengths += f", curriculum={train.curriculum}"
    rows = f"batch_size={train.batch_size}, accumulation_steps={train.accumulation_steps}"
    return f"{lengths}, {rows}"


def evaluation_sizes(config: RunConfig) -> str:
    """The settings that the memory of an evaluation depends on, besides the model's."""
    lengths = f"eval_lengths={config.task.test_lengths}"
    if config.train.select_length is not None:
        lengths += f", select_length={config.select_length}"
    return f"{lengths}, eval_batch_size={config.train.eval_batch_size}"


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether an error of XLA says that memory is short."""
    return str(error).startswith(EXHAUSTED)


def first_line(error: jax.errors.JaxRuntimeError) -> str:
    """What an error of XLA says, without its code."""
    return str(error).strip().splitlines()[0].removeprefix(f"{EXHAUSTED}: ")


def _require(what: str, needed: int, verb: str = "need") -> None:
    limit = available_bytes()
    if needed > limit:
        raise ConfigError(
            f"{what} {verb} at least {needed / 2**30:,.0f} GiB of memory; there are "
            f"{limit / 2**30:,.0f} GiB"
        )


@functools.cache
def available_bytes() -> int:
    """Memory of all devices together; of the machine, or its container, where they share it.

    A process sees its own devices; those of the others are taken to be as large.
    """
    processes = jax.process_count()
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(entry and "bytes_limit" in entry for entry in stats):
        return processes * sum(entry["bytes_limit"] for entry in stats)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(path).read_text()))
    return processes * min(limits)
