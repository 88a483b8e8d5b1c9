"""Checkpoints of a run by Orbax: saved asynchronously, the best and the newest both kept."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training.step import TrainState

Selection = tuple[float, ...]  # larger is better, compared entry by entry


class BestAndNewest:
    """Keeps the newest checkpoint and the best of those evaluated, the later of equals.

    Orbax's ``best_fn`` with ``max_to_keep`` ranks by metrics alone and deletes the newest, from
    which a run resumes, as soon as it is not among the best.
    """

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """One flag a checkpoint; ``checkpoints`` ascend in step."""
        keep = {best_step(checkpoints), checkpoints[-1].step if checkpoints else None}
        return [info.step in keep for info in checkpoints]


def best_step(checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo]) -> int | None:
    """The evaluated step with the best selection, the later of equals; None without any."""
    ranked = [(_selection(info), info.step) for info in checkpoints if _selection(info)]
    return max(ranked)[1] if ranked else None


def _selection(info: ocp.checkpoint_managers.PolicyCheckpointInfo) -> Selection:
    # A checkpoint whose removal was cut short may have lost its metrics; it was not the best.
    return tuple((info.metrics or {}).get("selection", ()))


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves under way at its end.

    With ``read_only`` nothing in the directory is touched, so that its run may go on meanwhile.

    Raises:
        RunDirectoryError: a checkpoint cannot be written or read, or is of another model.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if read_only else 1,
            preservation_policy=BestAndNewest(),
            best_fn=lambda metrics: metrics["selection"],  # without one metrics are not written
            cleanup_tmp_directories=not read_only,  # what a killed save left behind
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=True,
        )
        with self._errors("opened"), _quiet() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )

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
        # Orbax and its storage report a full or broken disk as OSError or ValueError.
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, RunDirectoryError):
                raise
            reason = " ".join(str(error).split())
            if len(reason) > 320:  # what failed comes first, why it failed comes last
                reason = f"{reason[:150]} ... {reason[-150:]}"
            raise RunDirectoryError(
                f"checkpoints in {self._directory} cannot be {what}: {reason}"
            ) from error

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, ascending."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Step of the newest checkpoint, None without any."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the best checkpoint, None without any that was evaluated."""
        steps = [_Info(step, self._manager.metrics(step)) for step in self.steps()]
        return best_step(steps)

    def save(self, state: TrainState, step: int, selection: Selection | None) -> None:
        """Starts a save; ``selection`` ranks the checkpoint, None leaves it unranked."""
        metrics = {"selection": list(selection or ())}
        with self._errors("written"):
            self._manager.save(
                step, args=ocp.args.StandardSave(state._asdict()), metrics=metrics, force=True
            )

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at ``step``, with the structure, shapes and dtypes of ``like``."""
        self.wait()
        with self._errors("read"):
            self._check_same_model(step, self._manager.item_metadata(step), like)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return TrainState(**restored)

    def _check_same_model(self, step: int, saved: Any, like: TrainState) -> None:
        have, want = _shapes(saved["params"]), _shapes(like.params)
        differing = sorted(name for name in have | want if have.get(name) != want.get(name))
        if differing:
            shown = "; ".join(
                f"{name} is {have.get(name, 'absent')} there, {want.get(name, 'absent')} here"
                for name in differing[:3]
            )
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RunDirectoryError(
                f"checkpoint {step} in {self._directory} is of another model: {shown}{more}"
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
        if str(unraisable.exc_value) != "Event loop is closed":
            self._show(unraisable)


class _Info:
    """A step and its metrics, as the preservation policy sees them."""

    def __init__(self, step: int, metrics: dict[str, Any] | None):
        self.step, self.metrics = step, metrics


def _shapes(params: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        "/".join(str(getattr(entry, "key", entry)) for entry in path): (
            f"{leaf.dtype}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }
