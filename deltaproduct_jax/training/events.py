"""TensorBoard events as bytes: one record for every row of metrics.

TensorBoard's own writers hide the file behind a thread, where a full disk goes unseen and nothing
can be taken back. A file of ours is a header and the rows in order, so that it can be written anew
from metrics.jsonl whenever a run resumes. Format: TFRecord, https://www.tensorflow.org/tutorials/
load_data/tfrecord#tfrecords_format_details (length, its checksum, event, its checksum).
"""

import struct
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

FILE_NAME = "events.out.tfevents.0.run"
NOT_PLOTTED = ("step", "time")


def header() -> bytes:
    """The record that every file of events begins with."""
    return _record(Event(file_version="brain.Event:2"))


def encode(row: dict[str, Any]) -> bytes:
    """The numbers of one row, at its step and time."""
    values = [
        Summary.Value(tag=name, simple_value=value)
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
