"""The mixer and the task that a page shows, as files of somebody else."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.tasks.registry import TASKS

README = Path(__file__).parents[1] / "deltaproduct_jax" / "models" / "README.md"
EXAMPLES = dict(re.findall(r"## (\w+\.py)\n.*?```python\n(.*?)```", README.read_text(), re.DOTALL))
TINY = {
    "hidden_size": 8, "intermediate_size": 8, "steps": 4, "batch_size": 4, "train_length": 4,
    "log_every": 2, "eval_every": 2, "checkpoint_every": 2, "eval_sequences": 8,
    "eval_batch_size": 8,
}  # fmt: skip


def write(folder: Path) -> None:
    for name, code in EXAMPLES.items():
        (folder / name).write_text(code)


def forget() -> None:
    """As in a process that has not imported any plug-in yet."""
    MIXERS.pop("average", None)
    TASKS.pop("first", None)
    for name in [n for n in sys.modules if re.match(r"(average|first)_[0-9a-f]{8}$", n)]:
        del sys.modules[name]


@contextlib.contextmanager
def written(folder: Path) -> Iterator[str]:
    """Inside, both are there and not imported yet; what ``--plugins`` says of them."""
    write(folder)
    forget()
    yield f"{folder}/average.py,{folder}/first.py"
    forget()


def flags_of(workdir: Path, plugins: str, **fields: object) -> list[str]:
    fields = {"workdir": workdir, "plugins": plugins} | TINY | fields
    return [f"--{name}={value}" for name, value in fields.items()]
