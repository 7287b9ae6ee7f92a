"""Keeps the KV cache of a session beside it, so that going on needs no reading. What fails is left out.

Files and their limits are `store.states`' concern, the cache itself the engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.store.sessions import Session
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.engine.interface import ReloadableEngine


class CacheKeeper:
    """The states of one store. Restoring and keeping never raise: a cache is only a cache.

    `keep` gives way to `stop`, from any thread, as soon as the block is written that it is at.
    """

    def __init__(self, states: StateStore) -> None:
        self._states = states
        self._kept: tuple[int, str, tuple[int, ...]] = (0, "", ())
        self._stopped = threading.Event()
        # What a crash has left of a state that was being written.
        with suppress(DsmoeError, OSError):
            states.tidy()

    def restore(self, conversation: Conversation, session: Session) -> None:
        """Give the engine what it held when the session was left."""
        # What fails is left out: the conversation is read again instead.
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
        """Write what the engine holds of the session and is not written yet, if it is there. `tell` is called
        before with the number of tokens that may be to be written.
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
        """Have a running `keep` end, and every later one until `go_on`."""
        self._stopped.set()

    def go_on(self) -> None:
        """Let `keep` work again."""
        self._stopped.clear()


def fingerprint(engine: ReloadableEngine) -> str:
    """What a state depends on beside its tokens; the engine knows."""
    return engine.info.cache_identity
