"""Saves the reply that is being generated, and the KV cache between replies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sequences import n_common
from dsmoe_local.base.text import count
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.store.sessions import Session
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.chat.turns import Transcript

if TYPE_CHECKING:
    from dsmoe_local.chat.terminal.screen import Screen

_MIN_INTERVAL = 2.0  # seconds
_MAX_SHARE = 1 / 20  # of the time may be spent on saving, so a slow disk is written to less often
_IDLE_SECONDS = 30.0  # the KV cache is stored after this time without input
_CLOSE_SECONDS = 60.0  # the longest time that the end of the chat waits for the current work
_ANNOUNCED_TOKENS = 1024  # storing a cache of this size takes seconds, and is announced


class Drafts:
    """Saves an unfinished reply every few seconds, so that a crash loses little of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0

    def begin(self) -> None:
        """Start with a new reply, right after its message was saved."""
        self._next = self._clock() + _MIN_INTERVAL

    def keep(self, partial: Callable[[], Transcript | None], save: Callable[[Transcript], None]) -> None:
        """Save the reply so far, which `partial` returns, if enough time has passed.

        An error is raised, and ends the saving of this reply's drafts.
        """
        begun = self._clock()
        if begun < self._next or (transcript := partial()) is None:
            return
        self._next = float("inf")
        save(transcript)
        ended = self._clock()
        self._next = ended + max(_MIN_INTERVAL, (ended - begun) / _MAX_SHARE)


class CacheKeeper:
    """Stores and loads the KV cache of a session. Errors are ignored, since the cache only saves time."""

    def __init__(self, states: StateStore) -> None:
        self._states = states
        # What is stored: number of the session, identity of the cache, token ids.
        self._kept: tuple[int, str, tuple[int, ...]] = (0, "", ())
        # Remove what a crash left behind.
        with suppress(DsmoeError, OSError):
            states.tidy()

    def restore(self, conversation: Conversation, session: Session) -> None:
        """Load the stored KV cache of a session into the engine."""
        with suppress(DsmoeError, OSError):
            ids, identity = conversation.context_ids(), conversation.engine.info.cache_identity
            held = 0
            for path in self._states.find(session.number, identity, ids) if ids else []:
                before, held = held, conversation.engine.load_cache(path, ids)
                if held <= before:
                    break
            self._kept = (session.number, identity, ids[: held - held % BLOCK])

    def keep(
        self,
        conversation: Conversation,
        session: Session,
        tell: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Store the part of the session's KV cache that is not stored yet.

        Before writing, `tell` is called with the number of tokens to store. Ends after the block that is
        being written once `stopped` returns true.
        """
        engine = conversation.engine
        if conversation.unanswered or not engine.alive:
            return
        with suppress(DsmoeError, OSError):
            ids, identity = conversation.context_ids(), engine.info.cache_identity
            number, before, kept = self._kept
            n_kept = n_common(kept, ids) if (number, before) == (session.number, identity) else 0
            if len(ids) - n_kept < BLOCK:
                return
            tell(len(ids) - n_kept)

            def write(path: Path, start: int, end: int) -> int:
                return engine.save_cache(path, ids[:end], start)

            n_stored = self._states.keep(session.number, identity, ids, write, stopped)
            self._kept = (session.number, identity, ids[:n_stored])
            self._states.tidy()


class CacheStoring:
    """Stores the KV cache when the chat is idle, before it changes the conversation, and when it ends.

    `caches` None: nothing is stored. `session` returns the session of the chat. `is_shown`: the status line
    tells that the cache is being stored.
    """

    def __init__(
        self,
        caches: CacheKeeper | None,
        conversation: Conversation,
        session: Callable[[], Session | None],
        screen: Screen,
    ) -> None:
        self.is_shown = False
        self._caches = caches
        self._conversation = conversation
        self._session = session
        self._screen = screen
        # Held while an input is handled or the cache is stored.
        self._working = threading.Lock()
        self._timer: threading.Timer | None = None
        self._stopped = threading.Event()

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Interrupt the storing, and keep the timer from beginning it until the block ends."""
        self._cancel_timer()
        self.interrupt()
        with self._working:
            self._stopped.clear()
            yield

    def begin_idle(self) -> None:
        """Store the cache after a while without input, in a timer's thread."""
        self._timer = threading.Timer(_IDLE_SECONDS, self.store_while_idle)
        self._timer.daemon = True
        self._timer.start()

    def store_while_idle(self) -> None:
        """Store the cache. The next input interrupts it."""
        if not self._working.acquire(blocking=False):
            return
        try:
            self._stopped.clear()
            if self._timer is not None:  # None: an input has just arrived
                self._store(self._show)
        finally:
            if self.is_shown:
                self._show(0)
            self._working.release()

    def store(self) -> None:
        """Store the cache, and announce it if the user has to wait."""
        self._store(self._announce)

    def restore(self, session: Session) -> None:
        """Load the stored KV cache of a session into the engine."""
        if self._caches is not None:
            self._caches.restore(self._conversation, session)

    def interrupt(self) -> None:
        """End the storing. May be called from any thread."""
        self._stopped.set()

    def end(self, *, keep: bool) -> None:
        """End the storing while idle. If `keep`, store the cache unless the user presses Ctrl-C."""
        self._cancel_timer()
        self.interrupt()
        if keep and self._working.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._stopped.clear()
                self.store()
            except KeyboardInterrupt:
                self._screen.notice(
                    "the cache is not stored: when the conversation is continued, it is read again"
                )
            finally:
                self._working.release()

    def _store(self, tell: Callable[[int], None]) -> None:
        session = self._session()
        if self._caches is not None and session is not None and session.number:
            self._caches.keep(self._conversation, session, tell, self._stopped.is_set)

    def _announce(self, n_tokens: int) -> None:
        if n_tokens >= _ANNOUNCED_TOKENS:
            self._screen.notice(f"storing the cache of {count(n_tokens, 'token')}: Ctrl-C skips it")

    def _show(self, n_tokens: int) -> None:
        """Show in the status line whether a cache is being stored: 0 tokens if not."""
        self.is_shown = n_tokens > 0
        # This also redraws the status line.
        self._screen.live(None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
