"""Whether a run fits into memory at all: what it certainly needs, against what there is."""

import contextlib
import os
from pathlib import Path

import jax

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.step import TrainState

# Limits that a container sets, by the version of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def require_memory(config: RunConfig, state: TrainState) -> None:
    """Raises ConfigError, naming the fields, if a run needs more memory than there is.

    Counted is only what no compiler can leave out, so that nothing is refused that would run: the
    state and its gradients, and the logits in float32 of a batch at each length.

    Args:
        config: the run.
        state: shapes and dtypes of what is trained.
    """
    model, task, train = config.model, config.task, config.train
    limit = available_bytes()
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    kept += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    _require(f"hidden_size={model.hidden_size} and num_layers={model.num_layers}", kept, limit)
    vocab_bytes = model.vocab_size * 4
    rows = train.batch_size // train.accumulation_steps
    needed = rows * task.train_length * vocab_bytes
    _require(f"train_length={task.train_length} and batch_size={train.batch_size}", needed, limit)
    for length in {*task.test_lengths, config.select_length}:
        needed = train.eval_batch_size * length * vocab_bytes
        _require(f"length {length} and eval_batch_size={train.eval_batch_size}", needed, limit)


def _require(what: str, needed: int, limit: int) -> None:
    if needed > limit:
        raise ConfigError(
            f"{what} need at least {needed / 2**30:,.0f} GiB of memory; there are "
            f"{limit / 2**30:,.0f} GiB"
        )


def available_bytes() -> int:
    """Memory of all devices together; of the machine, or its container, where they share it."""
    stats = [device.memory_stats() for device in jax.devices()]
    if all(entry and "bytes_limit" in entry for entry in stats):
        return sum(entry["bytes_limit"] for entry in stats)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)
