"""The GPUs of this machine, and which worker gets which."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

DEVICES = Path("/dev")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without asking CUDA.

    A scheduler or the user may have set that variable; else all that the driver shows are there.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA itself reads on until what is no GPU
        parts = (part.strip() for part in named.split(","))
        return list(itertools.takewhile(lambda part: part not in ("", "-1"), parts))
    found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in DEVICES.glob("nvidia*"))
    return [str(number) for number in sorted(int(match[1]) for match in found if match)]


def gpu_of(slot: int, gpus: Sequence[str]) -> list[str]:
    """The GPU of a worker whose run takes one: they are handed round."""
    return [gpus[slot % len(gpus)]] if gpus else []


def share_of(slot: int, workers: int, gpus: Sequence[str]) -> list[str]:
    """The GPUs of a worker that spreads runs over several: all are given out."""
    return list(gpus[slot::workers]) or gpu_of(slot, gpus)
