"""What programs take on a GPU itself: the sum of their kernels, by JAX's profiler.

It sees every kernel of the process, those of other packages too, and does not see the host, whose
share of a call is what wall times differ by from machine to machine.
"""

import glob
import re
import tempfile
from collections.abc import Mapping

import jax

from experiments.lib.bench.timing import Compiled

RUNS = 10


def kernel_times(entry: Compiled, runs: int = RUNS) -> dict[str, float]:
    """Milliseconds of one call by the name of the kernel; empty without a GPU."""
    if jax.default_backend() != "gpu":
        return {}
    entry.run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                entry.run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    times: dict[str, float] = {}
    for plane in profile.planes:
        for line in plane.lines:
            # Other lines show the same kernels again, by what they belong to.
            if "GPU" in plane.name and line.name.startswith("Stream"):
                for event in line.events:
                    milliseconds = event.duration_ns / 1e6 / (runs * entry.calls)
                    times[event.name] = times.get(event.name, 0.0) + milliseconds
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """Times of kernels whose names differ in numbers alone, added up, the largest first.

    XLA numbers its kernels, and libraries of matrix products put tile sizes into their names.
    """
    found: dict[str, float] = {}
    for name, milliseconds in times.items():
        kind = re.sub(r"[._]?\d+", "", name)
        found[kind] = found.get(kind, 0.0) + milliseconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def time_on_device(programs: Mapping[str, Compiled]) -> dict[str, dict[str, float]]:
    """`kernel_times` of each program, one after the other."""
    return {name: kernel_times(entry) for name, entry in programs.items()}
