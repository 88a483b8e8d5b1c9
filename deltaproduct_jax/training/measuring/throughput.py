"""How well a run uses its devices: tokens per second, part of their peak, time not lost, memory."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jax

# Dense bfloat16 FLOP/s of a chip as its maker publishes them, by the beginning of the name that JAX
# has for it. The longest that fits counts.
PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
# A product and a sum forward, twice as much backward.
OPERATIONS_A_PARAMETER_AND_TOKEN = 6


def peak_of(device_kind: str) -> float | None:
    """FLOP/s of a chip by the name that JAX has for it; None for one that is not in the table."""
    words = re.split("[ -]", device_kind)  # an A100 on its own board is an A100-SXM4-80GB
    known = {
        name: peak for name, peak in PEAKS.items() if words[: len(name.split())] == name.split()
    }
    return known[max(known, key=len)] if known else None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What the speed of a run is measured against.

    Attributes:
        devices: of its mesh.
        device_kind: as JAX names it.
        parameters: of the model.
    """

    devices: int
    device_kind: str
    parameters: int

    def columns(self, tokens_per_second: float) -> dict[str, float]:
        """Columns of a row of metrics, beside the tokens per second of all devices together.

        On one device that says all; ``mfu`` (model FLOP utilisation) needs a chip whose peak is
        known, and ``memory_peak_bytes``, the largest of any device of this process, one that counts
        its memory.
        """
        found: dict[str, float] = {}
        if self.devices > 1:
            found["tokens_per_second_per_device"] = tokens_per_second / self.devices
        utilisation = self.utilisation(tokens_per_second)
        if utilisation is not None:
            found["mfu"] = utilisation
        stats = [device.memory_stats() for device in jax.local_devices()]
        peaks = [entry["peak_bytes_in_use"] for entry in stats if entry]
        if peaks:
            found["memory_peak_bytes"] = max(peaks)
        return found

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Part of the chips' peak that the model's products take; None where it is not known."""
        peak = peak_of(self.device_kind)
        if peak is None:
            return None
        operations = OPERATIONS_A_PARAMETER_AND_TOKEN * self.parameters * tokens_per_second
        return operations / (self.devices * peak)

    def of_run(
        self, rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], now: float
    ) -> dict[str, Any]:
        """A whole run, from its records, as results.json has it; None for what is not known.

        Args:
            rows: of metrics.jsonl, at least one.
            starts: of run.json.
            now: when it ended, in seconds since 1970.
        """
        speed = rows[-1]["tokens"] / training_seconds(rows)
        peaks = [row["memory_peak_bytes"] for row in rows if "memory_peak_bytes" in row]
        return {
            "devices": self.devices,
            "device_kind": self.device_kind,
            "tokens_per_second_per_device": speed / self.devices,
            "mfu": self.utilisation(speed),
            "goodput": Goodput(rows, starts).until(now),
            "memory_peak_bytes": max(peaks, default=None),
        }


def in_words(found: Mapping[str, Any], skipped_steps: int) -> str:
    """What `Throughput.of_run` found, in one line."""
    several = "s" if found["devices"] > 1 else ""
    devices = f"{found['devices']} device{several} ({found['device_kind']})"
    parts = [f"{devices}: {found['tokens_per_second_per_device']:,.0f} tokens/s each"]
    parts.append(
        "MFU not known, since the chip's peak is not"
        if found["mfu"] is None
        else f"MFU {found['mfu']:.1%}"
    )
    if found["goodput"] is not None:
        parts.append(f"goodput {found['goodput']:.0%}")
    if found["memory_peak_bytes"] is not None:
        parts.append(f"memory peak {found['memory_peak_bytes'] / 2**30:.1f} GiB")
    if skipped_steps:
        parts.append(f"{skipped_steps} step{'s' if skipped_steps > 1 else ''} skipped")
    return ", ".join(parts)


def _seconds(row: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    return (row["tokens"] - before["tokens"]) / row["tokens_per_second"]


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that went into the steps on record; compiling and evaluating are left out."""
    return sum(itertools.starmap(_seconds, zip(rows, [_NOTHING, *rows], strict=False)))


class Goodput:
    """The part of the time since the first start that went into steps which count.

    What is lost: starting and compiling, evaluating and saving, steps that were skipped or made
    twice after a kill, and the time in which nothing ran.

    Args:
        rows: of metrics.jsonl.
        starts: of run.json; where the first has no time nothing can be told.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]):
        self._began = _began(starts)
        self._last: Mapping[str, Any] = _NOTHING
        self._productive = 0.0
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts the steps since the last row."""
        steps = row["step"] - self._last["step"]
        skipped = row.get("skipped_steps", 0) - self._last.get("skipped_steps", 0)
        self._productive += _seconds(row, self._last) * (1 - skipped / steps)
        self._last = row

    def until(self, now: float) -> float | None:
        """The part, from 0 to 1, at a time in seconds since 1970."""
        if self._began is None:
            return None
        return min(1.0, self._productive / max(now - self._began, 1e-9))


_NOTHING = {"tokens": 0, "step": 0}


def _began(starts: Sequence[Mapping[str, Any]]) -> float | None:
    text = starts[0].get("time") if starts else None
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
