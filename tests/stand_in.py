"""A script of the form that sweeps want, whose runs take a moment: it counts instead of training.

It goes on from the last step it recorded, notes every start and notes if it ever runs twice at
once. Imports nothing but the standard library, so that a run starts at once.
"""

import dataclasses
import fcntl
import json
import os
import sys
import time
from pathlib import Path


def _setting(default, help="a setting"):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Task:
    group: str = _setting("S3")
    lengths: tuple[int, ...] = _setting((4,))


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = _setting(3)
    seed: int = _setting(0)
    rate: float = _setting(0.5)
    shuffle: bool = _setting(True)
    limit: int | None = _setting(None)
    step_ms: int = _setting(0)
    failures: int = _setting(0, "starts that end with an error after the first step")
    killed: int = _setting(0, "starts that end by SIGKILL after the first step")

    def __post_init__(self):
        if self.steps < 1:
            from deltaproduct_jax.errors import ConfigError

            raise ConfigError(f"steps={self.steps!r} is too small; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    task: Task
    train: Train

    def to_dict(self):
        return json.loads(json.dumps(dataclasses.asdict(self)))


SECTIONS = {"task": Task, "train": Train}
PRESETS = {"default": {"rate": 0.25}, "long": {"steps": 9}}


def configure(sections):
    return Config(Task(**sections["task"]), Train(**sections["train"]))


def append(path, line):
    with open(path, "a") as file:
        file.write(line + "\n")


def alone(workdir):
    """Notes this process as the one at work, until it ends; False if another is."""
    file = open(workdir / "at_work", "a+")  # noqa: SIM115, it stays locked
    LOCKED.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return True


LOCKED = []


def main(argv):
    values = dict(argument.removeprefix("--").split("=", 1) for argument in argv)
    workdir = Path(values["workdir"])
    if not alone(workdir):
        append(workdir / "twice.txt", str(os.getpid()))
    metrics = workdir / "metrics.jsonl"
    (workdir / "config.json").write_text("{}")
    # Last: whoever sees a start finds what is above written too.
    append(workdir / "starts.txt", str(os.getpid()))
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    starts = len((workdir / "starts.txt").read_text().splitlines())
    steps = int(values.get("steps", 9 if values.get("preset") == "long" else 3))
    for step in range(done + 1, steps + 1):
        time.sleep(int(values.get("step_ms", 0)) / 1000)
        row = {"step": step, "loss": 1 / step, "tokens": 8 * step, "tokens_per_second": 4.0}
        append(metrics, json.dumps(row))
        if starts <= int(values.get("killed", 0)):
            os.kill(os.getpid(), 9)
        if starts <= int(values.get("failures", 0)):
            print(f"error: start {starts} of this run fails\n", file=sys.stderr)
            return 2
    score = {"token_accuracy": 1.0, "sequence_accuracy": int(values.get("seed", 0)) / 8}
    entries = [{"length": n, "strict": score | {"cumulative": [1.0, 0.5]}} for n in (4, 8)]
    results = {"steps": steps, "best_step": steps, "parameters": {"total": 7}, "test": entries}
    (workdir / ".results").write_text(json.dumps(results))
    (workdir / ".results").replace(workdir / "results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
