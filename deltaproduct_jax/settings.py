"""Fields of configurations: a default and the sentence that explains it, in docs and as a flag."""

import dataclasses
from typing import Any


def setting(default: Any, help: str, *, repeated: bool = False) -> Any:
    """A dataclass field whose ``help`` becomes the text of its flag.

    ``repeated`` is for a tuple of texts: the flag may be given several times, an entry each.
    """
    return dataclasses.field(default=default, metadata={"help": help, "repeated": repeated})
