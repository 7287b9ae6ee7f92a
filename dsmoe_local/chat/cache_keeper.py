"""Keeps the KV cache of a session beside it, so that going on needs no reading. What fails is left out.

Files and their limits are `store.states`' concern, the cache itself the engine's.
"""

from __future__ import annotations

from contextlib import suppress

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.store.sessions import Session
from dsmoe_local.chat.store.states import StateStore
from dsmoe_local.engine.types import ReloadableEngine

_WORTH_KEEPING = 128
"""Tokens; fewer are read sooner than found."""


class CacheKeeper:
    """The states of one store. Restoring and keeping never raise and never tell: a cache is only a cache."""

    def __init__(self, states: StateStore) -> None:
        self._states = states
        self._kept: tuple[int, str, tuple[int, ...]] | None = None
        # What a crash has left of a state that was being written.
        with suppress(DsmoeError, OSError):
            states.tidy()

    def restore(self, conversation: Conversation, session: Session) -> None:
        """Give the engine what it held when the session was left."""
        # What fails is left out: the conversation is read again instead.
        with suppress(DsmoeError, OSError):
            ids, of = conversation.context_ids(), fingerprint(conversation.engine)
            found = self._states.find(session.number, of, ids) if ids else None
            if found is not None and conversation.engine.load_cache(found, ids) >= len(ids) - 1:
                self._kept = (session.number, of, ids)

    def keep(self, conversation: Conversation, session: Session) -> None:
        """Write what the engine holds of the session, unless that is there already, or the engine is not."""
        engine = conversation.engine
        if conversation.unanswered or not engine.alive:
            return
        with suppress(DsmoeError, OSError):
            ids, of = conversation.context_ids(), fingerprint(engine)
            if len(ids) < _WORTH_KEEPING or self._kept == (session.number, of, ids):
                return
            if self._states.keep(session.number, of, ids, lambda path: engine.save_cache(path, ids)):
                self._kept = (session.number, of, ids)
            self._states.tidy()


def fingerprint(engine: ReloadableEngine) -> str:
    """What a state depends on beside its tokens; the engine knows."""
    return engine.info.cache_identity
