"""A streaming detokenizer: whole characters, reasoning apart from the answer, no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from dsmoe_local.engine.reasoning import Parts, ReasoningParser, overlap
from dsmoe_local.engine.tools.parser import ToolParser


class TextStream:
    """Turns the bytes of successive tokens into pieces of text.

    Invariant: the concatenated pieces are the decoded bytes (malformed ones as U+FFFD), without the markers
    that `parser` recognizes and the calls that `tools` recognizes, up to the first stop string in the answer.
    No piece ends in an incomplete character, or in the possible start of a marker or a stop string.
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        parser: ReasoningParser | None = None,
        tools: ToolParser | None = None,
    ) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._parser = parser or ReasoningParser()
        self._tools = tools
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by = ""

    @property
    def stopped(self) -> bool:
        """True if the answer has reached a stop string, which is then `stopped_by`."""
        return bool(self.stopped_by)

    @property
    def holds(self) -> bool:
        """True if text is held back because it may be the start of a stop string or a marker."""
        return bool(self._held) or self._parser.holds or (self._tools is not None and self._tools.holds)

    def begin_after(self, before: bytes) -> None:
        """Continue after the bytes `before`, which may end in an incomplete character."""
        self._decoder.decode(before)

    def feed(self, piece: bytes) -> Parts:
        """Add the bytes of a token and return the text that they complete; none if `stopped`."""
        parts = self._parser.feed(self._decoder.decode(piece))
        if self._tools is not None:
            answer, calls = self._tools.feed(parts.answer)
            parts = Parts(answer, parts.reasoning, calls)
        return self._release(parts, final=False)

    def finish(self, *, cut: bool) -> Parts:
        """Return the text held back. An incomplete character becomes U+FFFD, or is dropped if `cut`."""
        first = self._parser.feed("" if cut else self._decoder.decode(b"", True))
        last = self._parser.finish()
        parts = Parts(first.answer + last.answer, first.reasoning + last.reasoning)
        if self._tools is not None:
            fed, rest = self._tools.feed(parts.answer), self._tools.finish()
            parts = Parts(fed.text + rest.text, parts.reasoning, fed.calls + rest.calls)
        return self._release(parts, final=True)

    def _release(self, new: Parts, *, final: bool) -> Parts:
        if self.stopped:
            return Parts()
        text = self._held + new.answer
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            end, self.stopped_by = min(found)
            self._held = ""
            return Parts(text[:end], new.reasoning, new.calls)
        hold = 0 if final else max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return Parts(text[: len(text) - hold], new.reasoning, new.calls)
