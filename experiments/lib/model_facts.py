"""What the card of a model says of the run that trained it: training, text, where it comes from."""

from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.data.manifest import MANIFEST, read_manifest
from deltaproduct_jax.files import AnyPath, user_path
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.records import RunRecords

# Columns of metrics.jsonl that say how good a model is, or that an evaluation adds.
_LOSSES = ("loss", "accuracy", "bits_per_byte")


def facts_of_run(directory: AnyPath, config: RunConfig, step: int) -> dict[str, Mapping[str, Any]]:
    """Tables by title, of a run directory and the step of one of its checkpoints.

    Raises:
        RunDirectoryError: a record is damaged.
    """
    records = RunRecords(directory, config)
    return {
        "Training": _training(records.saved_rows(), config, step),
        **_texts(config),
        "Origin": _origin(records.starts()),
    }


def _training(rows: list[dict[str, Any]], config: RunConfig, step: int) -> dict[str, Any]:
    said: dict[str, Any] = {"task": type(config.task).__name__, "steps": step}
    for row in (row for row in rows if row["step"] <= step):
        said["tokens"] = row["tokens"]
        said |= {name: value for name, value in row.items() if name in _LOSSES}
        said |= {name: value for name, value in row.items() if name.startswith("valid_")}
    train = config.train
    return said | {"batch_size": train.batch_size, "learning_rate": train.learning_rate}


def _texts(config: RunConfig) -> dict[str, Mapping[str, Any]]:
    """A table for each prepared folder that the run read and that is still there."""
    tables = {}
    for name in getattr(config.task, "data", ()):
        folder = user_path(name, "data")
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            tokenizer = manifest["tokenizer"]
            tables[f"Text: {folder.name}"] = {
                "tokenizer": tokenizer["kind"],
                "tokenizer, sha256": tokenizer["sha256"],
                "tokens to train on": manifest["splits"]["train"]["tokens"],
                "documents to train on": manifest["splits"]["train"]["documents"],
                "files": len(manifest["sources"]),
            }
    return tables


def _origin(starts: list[dict[str, Any]]) -> dict[str, Any]:
    if not starts:
        return {}
    last = starts[-1]
    versions = last.get("versions", {})
    return {
        "command": " ".join(last.get("argv", ())),
        "commit": last.get("commit"),
        "changed since": last.get("dirty"),
        "jax": versions.get("jax"),
        "devices": f"{last.get('device_count')} x {last.get('device_kind')}",
        "time": last.get("time"),
    }
