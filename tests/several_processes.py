"""Starts the processes of one run on this machine, and waits for their ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tiny_run import flags_for

ROOT = Path(__file__).resolve().parents[1]
MESH = "data:-1,fsdp:2"


def start(
    workdir: Path,
    number: int,
    *,
    mesh: str = MESH,
    devices: int = 4,
    steps=12,
    flags=(),
    all_of_them=(),
    own_workdirs=False,
    **extra,
):
    """Starts the processes of a run, with ``devices`` in all.

    ``all_of_them`` are environment variables, ``extra`` those of the last process alone. With
    ``own_workdirs`` each has a folder of its number in ``workdir``, and sees no other.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // number}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    fields = {"hidden_size": 16, "num_heads": 2, "schedule": "constant", "steps": steps}
    cache = f"--compilation_cache={workdir.parent / 'programs'}"
    flags = [*flags_for(workdir, **fields), f"--mesh={mesh}", cache, *flags]
    joining = [f"--coordinator_address={address}", f"--num_processes={number}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_process", *flags]
            + ([*joining, f"--process_id={index}"] if number > 1 else [])
            + ([f"--workdir={workdir / str(index)}"] if own_workdirs else []),
            cwd=ROOT,
            env=environment | dict(all_of_them) | (extra if index == number - 1 else {}),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(number)
    ]


def finish(processes, timeout=240):
    """Exit code, output and errors of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def rows_in(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
