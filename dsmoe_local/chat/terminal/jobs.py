"""Which input is being dealt with, and which ones wait. Belongs to the thread that reads keys."""

from __future__ import annotations

from collections.abc import Callable

from dsmoe_local.chat import blocks

_MOST_SHOWN = 3


class Jobs:
    """Inputs, one after the other: `begin` is called with each in its turn."""

    def __init__(self, begin: Callable[[str], None]) -> None:
        self._begin = begin
        self.busy = False
        self.number = 0  # of the job that runs, or ran last
        self.leaving = False
        self.stopping_since: float | None = None
        self._waiting: list[str] = []

    @property
    def n_waiting(self) -> int:
        """How many inputs wait."""
        return len(self._waiting)

    def add(self, text: str) -> None:
        """Begin with an input, or let it wait; while the chat ends it is dropped."""
        if not self.busy:
            self.busy = True
            self.number += 1
            self._begin(text)
        elif text.strip() and not self.leaving:
            self._waiting.append(text)

    def done(self) -> None:
        """The job that ran is over; the next one begins, unless the chat ends."""
        self.busy, self.stopping_since = False, None
        if self._waiting and not self.leaving:
            self.add(self._waiting.pop(0))

    def take_back(self) -> str:
        """The last of those that wait, which does no more."""
        return self._waiting.pop()

    def take_all_back(self, draft: str) -> str:
        """All that wait, which do no more, and what is being typed, as one text."""
        waiting, self._waiting = self._waiting, []
        texts = [*waiting, *([draft] if draft else [])]
        if len(texts) > 1:
            # The marks of a block would be in the middle of it.
            texts = [text if (inner := blocks.content(text)) is None else inner for text in texts]
        return "\n".join(texts)

    def leave(self) -> None:
        """The chat ends after the job that runs; the others are dropped."""
        self.leaving = True
        self._waiting.clear()

    def lines(self) -> list[str]:
        """What there is to say about it."""
        lines = []
        if self.leaving:
            lines = ["leaving …"]
        elif self.stopping_since is not None:
            lines = ["stopping …  Ctrl-C again ends the engine; it starts anew with the next message"]
        lines += [f"queued: {text.strip()}" for text in self._waiting[:_MOST_SHOWN]]
        if self.n_waiting > _MOST_SHOWN:
            lines.append(f"queued: {self.n_waiting - _MOST_SHOWN} more")
        return lines
