"""Text of tokens as they come: no broken characters, and strings that end it."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character
OPEN = 3  # bytes at most of a character that is not complete
CONTEXT = 16  # tokens before the first; pieces such as SentencePiece's read otherwise at the start
LONGEST = 64  # tokens that are decoded anew at most


class TextStream:
    """Turns tokens into text that never has to be taken back.

    What comes out, put together, is what the tokens decode to behind the prompt. A character waits
    for its last byte; one that the prompt has begun comes out as well.

    Args:
        decode: ids to text.
        prompt: ids before the first.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()):
        self._decode = decode
        # The first ``_before`` ids are there as context, and ``_out`` characters behind it are out.
        self._ids = list(prompt[-CONTEXT:])
        self._before, self._out = len(self._ids), 0
        self._context = _without_open(decode(self._ids)) if self._ids else ""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(int(token))
        text = self._decode(self._ids)
        is_long = len(self._ids) - self._before > LONGEST
        certain = text if is_long else _without_open(text)
        if not certain.startswith(self._context) and certain != text:
            return ""  # some decoders write marks for a whole run of bytes until it is complete
        tail = self._behind_context(certain)
        new = self._advance(tail)
        if certain == text and tail:
            # A whole character ends here: what follows is decoded with these tokens before it.
            self._ids = self._ids[self._before :]
            self._before, self._out = len(self._ids), 0
            self._context = self._decode(self._ids)
        return new

    def close(self) -> str:
        """What has waited for more."""
        return self._advance(self._behind_context(self._decode(self._ids))) if self._ids else ""

    def _behind_context(self, text: str) -> str:
        if text.startswith(self._context):
            return text[len(self._context) :]
        return self._decode(self._ids[self._before :])

    def _advance(self, tail: str) -> str:
        new = tail[self._out :]
        self._out += len(new)
        return new


def _without_open(text: str) -> str:
    """Without what more bytes may change: marks of broken characters at the end."""
    kept = text.rstrip(REPLACEMENT)
    return text if len(text) == len(kept) else text[: max(len(kept), len(text) - OPEN)]


class StopStrings:
    """Passes text on until one of some strings appears in it.

    Args:
        stops: the strings; what could be the beginning of one waits.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that comes before any stop string; after one, nothing."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            at, self.found = min(places)
            return self._pass(at)
        return self._pass(len(self._held) - self._beginning())

    def close(self) -> str:
        """What was held, and began no stop string."""
        return "" if self.found is not None else self._pass(len(self._held))

    def _pass(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _beginning(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
