"""What other threads want on the screen, taken by the one that draws: in order, in bundles."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_SECONDS_BETWEEN = 0.05
_MOST_AT_ONCE = 4096  # characters of a reply between two looks at the keys

Action = Callable[[], None]


class Mailbox:
    """Pieces of a reply, bundled for `feed`, and actions; `redraw` is called after each bundle."""

    def __init__(self, feed: Callable[[str], None], redraw: Action) -> None:
        self._feed = feed
        self._redraw = redraw
        self._posted: deque[str | Action] = deque()
        self._awake = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken_at = 0.0
        self._paused = False

    def post(self, item: str | Action) -> None:
        """Leave an action, or a piece of a reply, which can wait a little for more. From any thread."""
        self._posted.append(item)
        if not isinstance(item, str):
            self._call(self._take)
        elif not self._awake.is_set():
            self._awake.set()
            self._call(self._schedule)

    def urge(self, action: Action) -> None:
        """Have something done also while what is posted has to wait. From any thread."""
        if self._loop is None:
            self._posted.append(action)
        else:
            self._call(action)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take what was posted, and all that will be, in this loop."""
        self._loop = loop
        self._call(self._take)

    def pause(self, paused: bool) -> None:
        """Whether the screen is somebody else's now; what is posted waits."""
        self._paused = paused
        if not paused:
            self._call(self._take)

    def _call(self, function: Action) -> None:
        if self._loop is None:
            return
        # Without a loop any more nothing is drawn any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _schedule(self) -> None:
        assert self._loop is not None
        self._loop.call_at(max(self._loop.time(), self._taken_at + _SECONDS_BETWEEN), self._take)

    def _take(self) -> None:
        assert self._loop is not None
        self._awake.clear()
        if self._paused or not self._posted:
            return
        room = _MOST_AT_ONCE
        pieces: list[str] = []
        while self._posted and room > 0 and not self._paused:
            item = self._posted.popleft()
            if isinstance(item, str):
                if len(item) > room:
                    self._posted.appendleft(item[room:])
                pieces.append(item[:room])
                room -= len(item)
                continue
            self._deliver(pieces)
            item()
        self._deliver(pieces)
        self._taken_at = self._loop.time()
        self._redraw()
        if self._posted and not self._paused and not self._awake.is_set():
            self._awake.set()
            # At once, but keys that came meanwhile are first.
            self._loop.call_soon(self._take)

    def _deliver(self, pieces: list[str]) -> None:
        if pieces:
            self._feed("".join(pieces))
            pieces.clear()
