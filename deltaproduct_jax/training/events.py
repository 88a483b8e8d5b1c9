"""TensorBoard events as bytes: one record for every row of metrics.

TensorBoard's own writers hide the file behind a thread, where a full disk goes unseen and nothing
can be taken back. A file of ours is a header and the rows in order, so that it can be written anew
from metrics.jsonl whenever a run resumes. Format: TFRecord, https://www.tensorflow.org/tutorials/
load_data/tfrecord#tfrecords_format_details (length, its checksum, event, its checksum).
"""

import struct
from collections.abc import Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

FILE_NAME = "events.out.tfevents.0.run"
NOT_PLOTTED = ("step", "time")
VALID = "valid_"  # before the columns of evaluations
# Beside the settings of a run on TensorBoard's page of hyperparameters, where a row has them.
OUTCOMES = ("valid/sequence_accuracy", "valid/loss", "train/loss")


def header(config: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The records that every file of events begins with: its version, and the run's settings.

    Args:
        config: sections of the configuration as config.json has them; what is None is left out.
    """
    settings = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for section in config.values()
        for name, value in section.items()
    }
    summaries = hparams(settings, dict.fromkeys(OUTCOMES, 0.0))
    events = [Event(file_version="brain.Event:2"), *(Event(summary=each) for each in summaries)]
    return b"".join(map(_record, events))


def tag(column: str) -> str:
    """A column of metrics.jsonl as TensorBoard groups it: under train/ or valid/."""
    return f"valid/{column.removeprefix(VALID)}" if column.startswith(VALID) else f"train/{column}"


def encode(row: dict[str, Any]) -> bytes:
    """The numbers of one row, at its step and time."""
    values = [
        Summary.Value(tag=tag(name), simple_value=value)
        for name, value in row.items()
        if name not in NOT_PLOTTED
    ]
    return _record(Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values)))


def _record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, _checksum(length), data, _checksum(data)],
    )


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
