"""How well a run uses its devices: tokens per second, part of their peak, time not lost, memory."""

import dataclasses
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
    words = device_kind.split()
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

    def summary(
        self, rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
    ) -> str:
        """One line on a whole run, from its records."""
        seconds = training_seconds(rows)
        speed = rows[-1]["tokens"] / seconds
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''} ({self.device_kind})"
        parts = [f"{devices}: {speed / self.devices:,.0f} tokens/s each"]
        utilisation = self.utilisation(speed)
        parts.append(
            "MFU not known, since the chip's peak is not"
            if utilisation is None
            else f"MFU {utilisation:.1%}"
        )
        parts.append(f"goodput {goodput(rows, starts):.0%}")
        if "memory_peak_bytes" in rows[-1]:
            parts.append(f"memory peak {rows[-1]['memory_peak_bytes'] / 2**30:.1f} GiB")
        return ", ".join(parts)


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that went into the steps on record; compiling and evaluating are left out."""
    before = [0, *(row["tokens"] for row in rows)]
    return sum(
        (row["tokens"] - tokens) / row["tokens_per_second"]
        for row, tokens in zip(rows, before, strict=False)
    )


def goodput(rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> float:
    """Part of the time since the first start that went into steps which count.

    What is lost: starting and compiling, evaluating and saving, steps made twice after a kill, and
    the time in which nothing ran.
    """
    began = datetime.fromisoformat(starts[0]["time"]).timestamp()
    return min(1.0, training_seconds(rows) / max(rows[-1]["time"] - began, 1e-9))
