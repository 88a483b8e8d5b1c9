"""Checkpoints of a run by Orbax: saved asynchronously, the best and the newest both kept."""

import contextlib
import functools
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import (
    AnyPath,
    errors_as_one_line,
    in_bucket,
    is_there,
    read_json,
    set_aside,
)
from deltaproduct_jax.training.step import TrainState

Selection = tuple[float, ...]  # larger is better, compared entry by entry
SKIPPED = "skipped"  # what a state has that older versions did not save
ITEM, METRICS, METADATA = "default", "metrics/metrics", "_CHECKPOINT_METADATA"  # in a step's folder


class SavedMetrics(TypedDict):
    """What is saved beside a state: what ranks it, where a stream stood, a `checksum` of all."""

    selection: list[float]
    data: NotRequired[dict[str, Any]]  # of a stream alone
    checksum: NotRequired[int]  # version 0.1 had none


class DamagedCheckpointError(RunDirectoryError):
    """A checkpoint that cannot be read, or is not what was saved."""

    def __init__(self, directory: AnyPath, step: int, reason: str):
        super().__init__(f"checkpoint {step} in {directory} is damaged: {_one_line(reason)}")
        self.step = step


class BestAndNewest:
    """Keeps the newest checkpoint and the best of those evaluated, the later of equals.

    Orbax's ``best_fn`` with ``max_to_keep`` ranks by metrics alone and deletes the newest, from
    which a run resumes, as soon as it is not among the best.

    Args:
        selections: of the checkpoints by step; what is not in it was not evaluated.
    """

    def __init__(self, selections: dict[int, Selection]):
        self._selections = selections

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """One flag a checkpoint; ``checkpoints`` ascend in step."""
        steps = [info.step for info in checkpoints]
        keep = {best_step(steps, self._selections), steps[-1] if steps else None}
        return [step in keep for step in steps]


def best_step(steps: Sequence[int], selections: dict[int, Selection]) -> int | None:
    """The evaluated step with the best selection, the later of equals; None without any."""
    ranked = [(selections[step], step) for step in steps if selections.get(step)]
    return max(ranked)[1] if ranked else None


class OwnFolders(ocp.path.step.NameFormat):
    """Folders named by their step that hold something of a checkpoint; all others are passed over.

    To Orbax a folder called 20 is checkpoint 20, whatever is in it, and to be deleted one day.
    """

    def __init__(self):
        self._standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        """The name of a step's folder."""
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        """Orbax's description of every checkpoint."""
        return (found for found in self._standard.find_all(base_path) if is_checkpoint(found.path))

    def find_step(self, base_path: Any, step: int) -> Any:
        """Orbax's description of one checkpoint; ValueError if it is not there."""
        return self._standard.find_step(base_path, step)


def is_checkpoint(folder: Any) -> bool:
    """Whether a folder holds anything of a checkpoint, however damaged."""
    if in_bucket(folder):  # where no folder can be renamed, Orbax ends a save by a file of its own
        return is_there(folder / ocp.path.atomicity.COMMIT_SUCCESS_FILE)
    return any((folder / name).exists() for name in (ITEM, METRICS, METADATA))


def steps_in(directory: AnyPath) -> list[int]:
    """Steps of the checkpoints in a directory, ascending; none where there is no directory."""
    with errors_as_one_line(directory, "read"):
        if not (is_there(directory) and directory.is_dir()):
            return []
        named = [path for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
        return sorted(int(path.name) for path in named if is_checkpoint(path))


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves under way at its end.

    With ``read_only`` nothing in the directory is touched, so that its run may go on meanwhile.

    Raises:
        RunDirectoryError: a checkpoint cannot be written or read, or is of another model.
    """

    def __init__(self, directory: AnyPath, *, read_only: bool = False):
        self.directory = directory
        self._selections: dict[int, Selection] = {}
        self._metrics_damage: dict[int, str] = {}
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if read_only else 1,
            preservation_policy=BestAndNewest(self._selections),
            best_fn=lambda metrics: metrics["selection"],  # without one metrics are not written
            lightweight_initialize=True,  # metrics are read here, where damage does no harm
            step_name_format=OwnFolders(),
            cleanup_tmp_directories=not read_only,  # what a killed save left behind
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=True,
        )
        with self._errors("opened"), _quiet() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                directory if in_bucket(directory) else directory.absolute(),
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        self._saved = {step: self._read_metrics(step) for step in self._manager.all_steps()}

    def __enter__(self) -> "Checkpoints":
        self._first_error_only = _FirstErrorOnly()
        self._first_error_only.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._errors("written"):
            self._manager.close()
        self._first_error_only.__exit__(*exception)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        # Orbax and its storage report a full or broken disk as OSError or ValueError; a bucket's
        # client has errors of its own.
        known = (Exception,) if in_bucket(self.directory) else (OSError, ValueError, KeyError)
        try:
            yield
        except known as error:
            if isinstance(error, RunDirectoryError):
                raise
            raise RunDirectoryError(
                f"checkpoints in {self.directory} cannot be {what}: {_one_line(str(error))}"
            ) from error

    def _read_metrics(self, step: int) -> SavedMetrics | None:
        path = self.directory / str(step) / METRICS
        # One whose removal was cut short may have lost its metrics; it was not the best.
        if not is_there(path):
            return None
        try:
            metrics = read_json(path, SavedMetrics)
        except RunDirectoryError as error:
            self._metrics_damage[step] = str(error)
            return None
        self._selections[step] = tuple(metrics["selection"])
        return metrics

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, ascending."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Step of the newest checkpoint, None without any."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the best checkpoint, None without any that was evaluated.

        Raises:
            DamagedCheckpointError: it cannot be told, since the metrics of one are damaged.
        """
        self._refuse_damaged_metrics(*self.steps())
        return best_step(self.steps(), self._selections)

    def _refuse_damaged_metrics(self, *steps: int) -> None:
        for step in steps:
            if step in self._metrics_damage:
                raise DamagedCheckpointError(self.directory, step, self._metrics_damage[step])

    def save(
        self,
        state: TrainState,
        step: int,
        selection: Selection | None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Starts a save.

        Args:
            state: what is saved.
            step: its number.
            selection: ranks the checkpoint; None leaves it unranked.
            data: where the stream of a run stands, None for a run without.
        """
        metrics: SavedMetrics = {"selection": [float(part) for part in selection or ()]}
        if data is not None:
            metrics["data"] = data
        metrics["checksum"] = checksum(state, metrics["selection"], data)
        if step not in self._manager.all_steps():
            self._make_room(self.directory / str(step))
        self._selections[step] = tuple(metrics["selection"])
        self._saved[step] = metrics
        with self._errors("written"):
            self._manager.save(
                step, args=ocp.args.StandardSave(state._asdict()), metrics=metrics, force=True
            )

    def _make_room(self, folder: AnyPath) -> None:
        """Keeps what somebody else has left where a checkpoint is to be."""
        # In a bucket the first process may have begun this very folder, so that it alone looks.
        if (in_bucket(folder) and jax.process_index() != 0) or not is_there(folder):
            return
        if in_bucket(folder):
            raise RunDirectoryError(
                f"{folder} was saved by another process meanwhile; the same command goes on there"
            )
        set_aside(folder)

    def data(self, step: int) -> dict[str, Any] | None:
        """Where the stream of a run stood at a checkpoint that `restore` found whole."""
        return self._saved[step].get("data")

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at ``step``, with the structure, shapes and dtypes of ``like``.

        Raises:
            DamagedCheckpointError: it cannot be read, or differs from what was saved.
            RunDirectoryError: it is of another model.
        """
        self.wait()
        self._refuse_damaged_metrics(step)
        if self._saved.get(step) is None:
            raise DamagedCheckpointError(self.directory, step, f"it has no {METRICS}")
        if not (self.directory / str(step) / ITEM).is_dir():
            raise DamagedCheckpointError(self.directory, step, f"it has no {ITEM}")
        try:
            saved = self._manager.item_metadata(step)
            if saved is None:
                raise ValueError(f"it has no {ITEM}/_METADATA")
            self._check_same_model(step, saved, like)
            have = {name: tree for name, tree in like._asdict().items() if name in saved}
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, have)
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            if SKIPPED not in saved:  # by a version that skipped no step
                restored[SKIPPED] = _zeros(getattr(like, SKIPPED))
            state = TrainState(**restored)
        except (RunDirectoryError, MemoryError):
            raise
        except Exception as error:  # what Orbax raises depends on which byte is wrong
            stumbled = isinstance(error, LookupError | AttributeError | TypeError)
            reason = f"{ITEM} describes no arrays: {error!r}" if stumbled else str(error)
            raise DamagedCheckpointError(self.directory, step, reason or repr(error)) from error
        if int(state.step) != step:  # the folder has another name than it was saved under
            reason = f"it holds step {int(state.step)}"
            raise DamagedCheckpointError(self.directory, step, reason)
        beside = self._saved[step]
        found = checksum(state, beside["selection"], beside.get("data"))
        if found != beside.get("checksum", found):
            raise DamagedCheckpointError(self.directory, step, "its numbers are not those saved")
        return state

    def whole(self, like: TrainState, up_to: int | None = None) -> list[int]:
        """Steps of the checkpoints that can be restored, ascending, if need be up to one."""
        found = []
        for step in self.steps():
            if up_to is not None and step > up_to:
                break
            with contextlib.suppress(DamagedCheckpointError):
                self.restore(step, like)
                found.append(step)
        return found

    def _check_same_model(self, step: int, saved: Any, like: TrainState) -> None:
        have, want = _shapes(saved["params"]), _shapes(like.params)
        # Version 0.1 trained parameters of bfloat16 as they were; Orbax reads them as float32.
        fit = {name: text.replace("bfloat16", "float32") for name, text in have.items()}
        differing = sorted(name for name in fit | want if fit.get(name) != want.get(name))
        if differing:
            shown = "; ".join(
                f"{name} is {have.get(name, 'absent')} there, {want.get(name, 'absent')} here"
                for name in differing[:3]
            )
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RunDirectoryError(
                f"checkpoint {step} in {self.directory} is of another model: {shown}{more}"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that what was asked to be read-only is read-only."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class _FirstErrorOnly:
    """Keeps failures that follow a reported one from being shown as a traceback each.

    Orbax handles all arrays at once, raises the first failure and closes its event loop. What ends
    after that has nowhere to report to, of which Python tells through ``sys.unraisablehook``.
    """

    def __enter__(self) -> None:
        self._show = sys.unraisablehook
        sys.unraisablehook = self._hook

    def __exit__(self, exception_type: type | None, *exception: object) -> None:
        if exception_type is None:  # after a failure there may be more to come
            sys.unraisablehook = self._show

    def _hook(self, unraisable: Any) -> None:
        text = str(unraisable.exc_value)
        if text != "Event loop is closed" and "reading array index" not in text:
            self._show(unraisable)


def checksum(
    state: TrainState, selection: Sequence[float], data: dict[str, Any] | None = None
) -> int:
    """A number of 32 bits that changes with any single bit of a state or what stands beside it.

    Storage has checksums of its own for small arrays only. This one is a sum of whole numbers, so
    that it is the same however the arrays lie on devices.
    """
    words = int(_sum_of_words(tuple(jax.tree.leaves(state))))
    beside = repr([float(part) for part in selection])
    if data is not None:
        beside += json.dumps(data, sort_keys=True)
    return (words + zlib.crc32(beside.encode())) % 2**32


@functools.partial(jax.jit)
def _sum_of_words(leaves: tuple[jax.Array, ...]) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for index, leaf in enumerate(leaves):
        kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
        words = jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
        # An odd factor for each leaf, or two that have changed places would go unseen.
        total += jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32) * jnp.uint32(2 * index + 1)
    return total


def _zeros(like: Any) -> Any:
    """Zeros that lie where arrays, or their descriptions, do."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return jax.jit(make, out_shardings=shardings)()


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 320 else f"{text[:150]} ... {text[-150:]}"  # why comes last


def _shapes(params: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        "/".join(str(getattr(entry, "key", entry)) for entry in path): (
            f"{leaf.dtype}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }
