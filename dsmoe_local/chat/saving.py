"""Saves the reply that is being generated, and the KV cache between replies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.store.sessions import Session
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.chat.turns import Transcript

_MIN_INTERVAL = 2.0  # seconds
_MAX_SHARE = 1 / 20  # of the time may be spent on saving, so a slow disk is written to less often


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
    """Stores and loads the KV cache of a session. Errors are ignored, since the cache only saves time.

    `stop` may be called from any thread: a running `keep` ends after the block that it is writing.
    """

    def __init__(self, states: StateStore) -> None:
        self._states = states
        # What is stored: number of the session, identity of the cache, token ids.
        self._kept: tuple[int, str, tuple[int, ...]] = (0, "", ())
        self._stopped = threading.Event()
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
        self, conversation: Conversation, session: Session, tell: Callable[[int], None] = lambda n: None
    ) -> None:
        """Store the part of the session's KV cache that is not stored yet.

        Before writing, `tell` is called with the number of tokens to store.
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

            n_stored = self._states.keep(session.number, identity, ids, write, self._stopped.is_set)
            self._kept = (session.number, identity, ids[:n_stored])
            self._states.tidy()

    def stop(self) -> None:
        """End a running `keep`, and later ones until `allow` is called."""
        self._stopped.set()

    def allow(self) -> None:
        """Allow `keep` again."""
        self._stopped.clear()
