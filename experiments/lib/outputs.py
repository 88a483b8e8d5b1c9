"""What a command prints: which of its two outputs takes no more, and quiet from then on."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class Output:
    """An output that remembers the error of a write, which does not say where it arose."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, what the output's encoding lacks as Python would spell it."""
        encoding = self._stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        return self._remembering(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Hands on what a buffer holds."""
        self._remembering(self._stream.flush)

    def _remembering(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            self.error = error
            # Python would else write once more at its end what could not be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Output]]:
    """Both outputs by name, which Python prints to as long as this lasts."""
    with open(os.devnull, "w") as nowhere:  # where a process is started with an output closed
        output, error = Output(sys.stdout or nowhere), Output(sys.stderr or nowhere)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            yield {"standard output": output, "standard error": error}


def say_last(text: str) -> None:
    """A line on standard error, if that still takes one: a terminal may have been closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def end_at_once(code: int) -> None:
    """Ends the process with no more than what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # it is closed, or takes no more
            stream.flush()
    os._exit(code)
