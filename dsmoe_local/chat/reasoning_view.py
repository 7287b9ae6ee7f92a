"""Shows the reasoning of a reply, or that there is some, and what it took."""

from __future__ import annotations

import time

from dsmoe_local.base.text import count
from dsmoe_local.chat.terminal.screen import ReplyView
from dsmoe_local.engine.types import TokenEvent


class ReasoningView:
    """The reasoning of one reply. `shows` is false if only its length is shown."""

    def __init__(self, view: ReplyView, *, shows: bool) -> None:
        self._view = view
        self._shows = shows
        self._began: float | None = None  # None: there is no text, or it has ended
        self._n_tokens = 0

    def take(self, event: TokenEvent) -> None:
        """Show what an event adds."""
        self._n_tokens += event.in_reasoning
        if event.reasoning:
            if self._began is None:
                self._began = time.monotonic()
            if self._shows:
                self._view.reasoning(event.reasoning)
        if self._began is None:
            return
        if event.finish_reason is not None or not event.in_reasoning:
            seconds = time.monotonic() - self._began
            self._view.reasoned(f"thought for {seconds:.0f} s, {count(self._n_tokens, 'token')}")
            self._began = None
        elif not self._shows:
            self._view.reasons(self._n_tokens)
