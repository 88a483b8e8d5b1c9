"""Fields of configurations: a default and the sentence that explains it, in docs and as a flag."""

import dataclasses
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field whose ``help`` becomes the text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help})
