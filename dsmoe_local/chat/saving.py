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
from dsmoe_local.engine.interface import ReloadableEngine

_LEAST_INTERVAL = 2.0  # seconds
_MOST_SHARE = 1 / 20  # of the time, for saving: a slow disk is written to less often


class Drafts:
    """Saves a growing reply from time to time, so that a crash loses only seconds of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0

    def begin(self) -> None:
        """Start with a new reply. Its question is saved already."""
        self._next = self._clock() + _LEAST_INTERVAL

    def keep(self, growing: Callable[[], Transcript | None], save: Callable[[Transcript], None]) -> None:
        """Save the reply so far, if it is time. After an error, which is raised, it is not tried again before
        the end of the reply.
        """
        begun = self._clock()
        if begun < self._next or (transcript := growing()) is None:
            return
        self._next = float("inf")
        save(transcript)
        ended = self._clock()
        self._next = ended + max(_LEAST_INTERVAL, (ended - begun) / _MOST_SHARE)


class CacheKeeper:
    """Stores the KV cache of a session, and loads it again. Errors are ignored: the cache only saves time.

    `stop`, from any thread, ends a running `keep` after the block that is being written.
    """

    def __init__(self, states: StateStore) -> None:
        self._states = states
        self._kept: tuple[int, str, tuple[int, ...]] = (0, "", ())
        self._stopped = threading.Event()
        # Removes what a crash left.
        with suppress(DsmoeError, OSError):
            states.tidy()

    def restore(self, conversation: Conversation, session: Session) -> None:
        """Load the stored KV cache of a session into the engine."""
        with suppress(DsmoeError, OSError):
            ids, of = conversation.context_ids(), fingerprint(conversation.engine)
            held = 0
            for path in self._states.find(session.number, of, ids) if ids else []:
                before, held = held, conversation.engine.load_cache(path, ids)
                if held <= before:
                    break
            self._kept = (session.number, of, ids[: held - held % BLOCK])

    def keep(
        self, conversation: Conversation, session: Session, tell: Callable[[int], None] = lambda n: None
    ) -> None:
        """Store the part of the session's KV cache that is not stored yet. Before it is written, `tell` is
        called with its number of tokens.
        """
        engine = conversation.engine
        if conversation.unanswered or not engine.alive:
            return
        with suppress(DsmoeError, OSError):
            ids, of = conversation.context_ids(), fingerprint(engine)
            number, before, kept = self._kept
            n_kept = n_common(kept, ids) if (number, before) == (session.number, of) else 0
            if len(ids) - n_kept < BLOCK:
                return
            tell(len(ids) - n_kept)

            def write(path: Path, start: int, end: int) -> int:
                return engine.save_cache(path, ids[:end], start)

            n_stored = self._states.keep(session.number, of, ids, write, self._stopped.is_set)
            self._kept = (session.number, of, ids[:n_stored])
            self._states.tidy()

    def stop(self) -> None:
        """End a running `keep`, and later ones until `go_on` is called."""
        self._stopped.set()

    def go_on(self) -> None:
        """Allow `keep` again."""
        self._stopped.clear()


def fingerprint(engine: ReloadableEngine) -> str:
    """Return what a stored cache depends on besides its tokens."""
    return engine.info.cache_identity
