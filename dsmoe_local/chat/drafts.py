"""Stores a reply while it grows, so that whatever ends the chat loses seconds of it, not all."""

from __future__ import annotations

import time
from collections.abc import Callable

from dsmoe_local.chat.turns import Transcript

_EVERY = 2.0  # seconds, at least
_SHARE = 20
"""Of the time that a reply takes, saving takes one part in as many: a slow disk is written to less often."""


class Drafts:
    """Decides when a growing reply is saved. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0

    def begin(self) -> None:
        """A reply begins; what it answers has been saved."""
        self._next = self._clock() + _EVERY

    def keep(self, growing: Callable[[], Transcript | None], save: Callable[[Transcript], None]) -> None:
        """Save what came so far, if it is time. What `save` raises is raised; then it is not tried again in
        this reply, whose end is saved anyway.
        """
        begun = self._clock()
        if begun < self._next or (transcript := growing()) is None:
            return
        self._next = float("inf")
        save(transcript)
        ended = self._clock()
        self._next = ended + max(_EVERY, _SHARE * (ended - begun))
