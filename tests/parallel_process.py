"""One process of several that train the tiny run; a program of its own.

``python -m tests.parallel_process FLAGS`` is ``python -m experiments.state_tracking FLAGS`` with a
model that compiles at once; SCRIPT=language_modeling in the environment is that script. DIE_AT
there makes a process fail, as a bug would, behind that step; ASK_AT makes it say so, wait for a
line of its standard input, and go slowly. STEP_S is how long each step takes at least, HEARTBEAT_S
how soon the others of a dead one end, JOIN_S how long they wait for one that does not come, and
LATE_S how much later than the others a process makes its mesh.
`start` starts all processes of a run on this machine, and `finish` waits for their ends.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import tiny_run
from tiny_run import flags_for

from deltaproduct_jax.parallel import layout, processes
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.stopping import SharedStopRequest
from experiments import language_modeling, state_tracking

ROOT = Path(__file__).resolve().parents[1]
MESH = "data:-1,fsdp:2"
SCRIPTS = {"state_tracking": state_tracking, "language_modeling": language_modeling}


def address_and_environment(devices):
    """A free address of this machine, and the environment of a process with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return address, os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }


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
    flags_of_last=(),
    **extra,
):
    """Starts the processes of a run, with ``devices`` in all.

    ``all_of_them`` are environment variables, ``extra`` those of the last process alone, as
    ``flags_of_last`` are flags. With ``own_workdirs`` each has a folder of its number in
    ``workdir``, and sees no other.
    """
    address, environment = address_and_environment(devices // number)
    fields = {"hidden_size": 16, "num_heads": 2, "schedule": "constant", "steps": steps}
    cache = f"--compilation_cache={workdir.parent / 'programs'}"
    flags = [*flags_for(workdir, **fields), f"--mesh={mesh}", cache, *flags]
    joining = [f"--coordinator_address={address}", f"--num_processes={number}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_process", *flags]
            + ([*joining, f"--process_id={index}"] if number > 1 else [])
            + ([f"--workdir={workdir / str(index)}"] if own_workdirs else [])
            + (list(flags_of_last) if index == number - 1 else []),
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


def main() -> int:
    """Exit code of the command."""
    loop.SequenceModel = tiny_run.TinyModel
    for name, variable in (
        ("HEARTBEAT_TIMEOUT_S", "HEARTBEAT_S"),
        ("INITIALIZATION_TIMEOUT_S", "JOIN_S"),
    ):
        if variable in os.environ:
            setattr(processes, name, int(os.environ[variable]))
    step_s, late_s = (float(os.environ.get(name, 0)) for name in ("STEP_S", "LATE_S"))
    make_mesh = layout.make_mesh

    def make_late(*given):
        time.sleep(late_s)
        return make_mesh(*given)

    layout.make_mesh = make_late
    reached = SharedStopRequest.reached

    def behind(self, step):
        if step == int(os.environ.get("DIE_AT", -1)):
            raise RuntimeError(f"made to fail behind step {step}")
        ask_at = int(os.environ.get("ASK_AT", sys.maxsize))
        if step == ask_at:
            print("waiting", flush=True)
            sys.stdin.readline()
        if step > ask_at:  # processes take a second to agree, which are many steps of this model
            time.sleep(0.1)
        time.sleep(step_s)
        return reached(self, step)

    SharedStopRequest.reached = behind
    return SCRIPTS[os.environ.get("SCRIPT", "state_tracking")].main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
