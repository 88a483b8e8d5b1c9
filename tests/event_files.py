"""Reads TensorBoard's event files without the code that wrote them."""

import struct

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path) -> list[Event]:
    """The events of a TFRecord file; a wrong length or checksum fails."""
    data, found = path.read_bytes(), []
    while data:
        length, length_crc = struct.unpack("<QI", data[:12])
        assert length_crc == masked(data[:8])
        content = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(content),)
        found.append(Event.FromString(content))
        data = data[16 + length :]
    return found


def scalars(events: list[Event]) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers by tag of all events, without those of the page of hyperparameters."""
    assert events[0].file_version == "brain.Event:2"
    assert all(
        value.metadata.plugin_data.plugin_name == "hparams"
        for e in events[1:4]
        for value in e.summary.value
    )
    return [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[4:]]


def hyperparameters(events: list[Event]) -> tuple[dict[str, object], list[str]]:
    """Settings by name, and tags of the outcomes shown beside them."""
    values = [value for event in events[1:4] for value in event.summary.value]
    data = [HParamsPluginData.FromString(value.metadata.plugin_data.content) for value in values]
    assert [value.tag for value in values] == [
        f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")
    ]
    settings = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in data[1].session_start_info.hparams.items()
    }
    assert {info.name for info in data[0].experiment.hparam_infos} == settings.keys()
    return settings, [info.name.tag for info in data[0].experiment.metric_infos]
