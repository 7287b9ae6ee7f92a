"""A streaming detokenizer: yields whole characters, and no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of successive tokens into text pieces.

    Invariant: the concatenated pieces are the decoded bytes (malformed ones as U+FFFD) up to the first stop
    string. No piece ends in an incomplete character or in the possible start of a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    @property
    def holds(self) -> bool:
        """True if text is held back because it may be the start of a stop string."""
        return bool(self._held)

    def begin_after(self, before: bytes) -> None:
        """Continue after the bytes `before`, which may end in an incomplete character."""
        self._decoder.decode(before)

    def feed(self, piece: bytes) -> str:
        """Add the bytes of a token and return the text that they complete; "" if `stopped`."""
        return self._release(self._decoder.decode(piece), final=False)

    def finish(self, *, cut: bool) -> str:
        """Return the text held back. An incomplete character becomes U+FFFD, or is dropped if `cut`."""
        return self._release("" if cut else self._decoder.decode(b"", True), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        hold = 0 if final else self._possible_start(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _possible_start(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
