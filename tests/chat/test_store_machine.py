"""Sessions as a state machine: whatever chats do to one store, it holds what a plain-Python model says."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.stored import OpenSession, StoreModel, replied, said, without_ids

from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.store.sessions import Session, SessionStore
from dsmoe_local.chat.turns import Role, Transcript, Turn

N_STORES = 2
WORDS = ["alpha", "alphabet", "Beta", "café", "cafe", "专家", "混合专家模型", "家模", "模", "x86"]
NAMES = ["one", "ONE", "one 2", "two", "专家", "chat-2", "chat-3"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
names = st.sampled_from(NAMES)
stores = st.integers(0, N_STORES - 1)
picks = st.integers(0, 1000)


@dataclass
class Chat:
    """A chat that is open: in one of the stores, with its session and the transcript on its screen."""

    store: int
    session: Session
    transcript: Transcript = field(default_factory=Transcript)
    model: OpenSession = field(default_factory=OpenSession)


class Sessions(RuleBasedStateMachine):
    """Two programs with the store open, and any number of chats in each."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stores = [SessionStore.open(self.folder / "sessions") for _ in range(N_STORES)]
        self.killed: list[SessionStore] = []
        self.chats: list[Chat] = []
        self.model = StoreModel()

    def teardown(self) -> None:
        for store in (*self.stores, *self.killed):
            store.close()
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        self.new_chat(0, "alpha")
        self.new_chat(1, "专家")

    @rule(store=stores, text=texts)
    def new_chat(self, store: int, text: str) -> None:
        chat = Chat(store, self.stores[store].create("fake", "v", ""))
        self.chats.append(chat)
        if len(text) % 2:
            self.change(chat, (said(text), replied(text)))

    @rule(pick=picks, text=texts, reply=texts, keep_both=st.booleans())
    def send(self, pick: int, text: str, reply: str, keep_both: bool) -> None:
        chat = self.pick(pick)
        self.change(chat, (*chat.transcript.turns, said(text)))
        if keep_both:
            self.change(chat, (*chat.transcript.turns, replied(reply)))

    @rule(pick=picks, reply=texts)
    def regenerate(self, pick: int, reply: str) -> None:
        chat = self.pick(pick)
        if len(chat.transcript.turns) > 1:
            self.change(chat, (*chat.transcript.turns[:-1], replied(reply)))

    @rule(pick=picks, n=st.integers(1, 3))
    def undo(self, pick: int, n: int) -> None:
        chat = self.pick(pick)
        turns, gone = chat.transcript.turns[: -2 * n], chat.transcript.turns[-2 * n :]
        self.change(chat, turns, undone=(*gone, *chat.transcript.undone))

    @rule(pick=picks, n=st.integers(1, 3))
    def redo(self, pick: int, n: int) -> None:
        chat = self.pick(pick)
        undone = chat.transcript.undone
        self.change(chat, (*chat.transcript.turns, *undone[: 2 * n]), undone=undone[2 * n :])

    @rule(pick=picks, replies=st.lists(texts, min_size=1, max_size=3), what=st.integers(0, 3))
    def grow(self, pick: int, replies: list[str], what: int) -> None:
        """A reply that is stored while it grows, to a message or in place of one; it may never end."""
        chat = self.pick(pick)
        turns = chat.transcript.turns[: -2 if what == 1 else None]
        if what > 1 or not turns or turns[-1].role is Role.ASSISTANT:
            turns = (*turns, said(replies[0]))
        text = ""
        for piece in replies:
            text += piece
            self.change(chat, (*turns, replied(text)), partial=True)
        if what % 2:
            self.change(chat, (*turns, replied(text)))

    @rule(pick=picks, system=texts, n_left_out=st.integers(0, 3))
    def change_system(self, pick: int, system: str, n_left_out: int) -> None:
        chat = self.pick(pick)
        chat.transcript = replace(chat.transcript, system=system, n_left_out=n_left_out)
        self.change(chat, chat.transcript.turns, chat.transcript.undone)

    @precondition(lambda self: self.model.order)
    @rule(pick=picks, store=stores)
    def load(self, pick: int, store: int) -> None:
        stored = self.model.sessions[self.model.order[pick % len(self.model.order)]]
        session = self.stores[store].find(stored.name)
        chat = Chat(store, session, session.load("v"))
        self.model.remember(chat.model, stored)
        assert chat.transcript == stored.whole
        self.chats.append(chat)

    @rule(pick=picks, name=names, named=st.booleans())
    def fork(self, pick: int, name: str, named: bool) -> None:
        chat = self.pick(pick)
        store = self.stores[chat.store]
        taken = named and self.model.is_taken(name)
        if taken or not chat.transcript.turns:
            with pytest.raises(UsageError):
                store.fork(chat.session, name if named else "")
            return
        session = store.fork(chat.session, name if named else "")
        fork = Chat(chat.store, session, chat.transcript)
        self.model.fork(chat.model, fork.model, name if named else "")
        self.chats.append(fork)

    @precondition(lambda self: self.model.order)
    @rule(pick=picks, text=texts, undo=st.booleans())
    def fork_and_go_on(self, pick: int, text: str, undo: bool) -> None:
        chat = self.pick(pick)
        if chat.transcript.turns:
            self.fork(pick, "", named=False)
            fork = self.chats[-1]
            self.change(fork, (*fork.transcript.turns, said(text), replied(text)))
            if undo:
                self.change(fork, fork.transcript.turns[:-3])

    @precondition(lambda self: self.model.order)
    @rule(pick=picks, store=stores, name=names)
    def rename(self, pick: int, store: int, name: str) -> None:
        number = self.model.order[pick % len(self.model.order)]
        stored = self.model.sessions[number]
        session = self.stores[store].find(str(number))
        assert session.number == number
        if self.model.is_taken(name) and stored.name.casefold() != name.casefold():
            with pytest.raises(UsageError):
                self.stores[store].rename(session, name)
            return
        self.stores[store].rename(session, name)
        self.model.rename(number, name)
        for chat in self.chats:
            # Those of the other store learn it with their next save.
            if chat.model.number == number and chat.store == store:
                chat.model.name = name

    @precondition(lambda self: self.model.order)
    @rule(pick=picks, store=stores)
    def delete(self, pick: int, store: int) -> None:
        # Rather one that shares its turns.
        trees = [*self.model.trees.values()]
        shared = [number for number in self.model.order if trees.count(self.model.trees[number]) > 1]
        candidates = shared if shared and pick % 4 else self.model.order
        number = candidates[pick % len(candidates)]
        self.stores[store].delete(self.stores[store].find(str(number)))
        self.model.delete(number)

    @rule(store=stores)
    def kill(self, store: int) -> None:
        self.killed.append(self.stores[store])
        self.stores[store] = SessionStore.open(self.folder / "sessions")
        self.chats = [chat for chat in self.chats if chat.store != store]
        self.new_chat(store, "x")

    @rule(
        store=stores,
        words=st.lists(st.sampled_from([*WORDS, "alp", "bet", "专", "none"]), min_size=1, max_size=2),
    )
    def search(self, store: int, words: list[str]) -> None:
        hits = self.stores[store].search(" ".join(words), 1000)
        contents = []
        for hit in hits:
            stored = self.model.sessions[hit.number]
            assert hit.session == stored.name
            turn = stored.path[hit.turn - 1][1]
            assert hit.role is turn.role
            contents.append(turn.content)
        assert sorted(contents) == self.model.found(words)

    @invariant()
    def lists_agree(self) -> None:
        stored = [self.model.sessions[number] for number in reversed(self.model.order)]
        expected = [
            (session.number, session.name, len(session.whole.turns))
            for session in stored
            if session.whole.turns or not re.fullmatch(r"chat-\d+( \d+)?", session.name)
        ]
        with_turns = [session.number for session in stored if session.path]
        for store in self.stores:
            summaries = store.summaries()
            assert [(each.number, each.name, each.n_turns) for each in summaries] == expected
            assert store.names() == [name for _, name, _ in expected]
            latest = store.latest()
            assert (latest.number if latest else 0) == (with_turns[0] if with_turns else 0)

    @invariant()
    def every_session_is_whole(self) -> None:
        for session in self.model.sessions.values():
            found = self.stores[0].find(session.name)
            assert found.number == session.number
            assert found.load("v") == session.whole
            assert found.load("w") == without_ids(session.whole)

    @invariant()
    def database_is_sound(self) -> None:
        connection = sqlite3.connect(self.folder / "sessions" / "sessions.db")
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            ((n_turns,),) = connection.execute("SELECT count(*) FROM turn")
            ((n_indexed,),) = connection.execute("SELECT count(*) FROM search_index")
            assert n_turns == n_indexed == len(self.model.writers)
        finally:
            connection.close()

    def pick(self, pick: int) -> Chat:
        # Rather one that was opened lately.
        return self.chats[-1 - pick % min(len(self.chats), 3 + pick % 3)]

    def change(
        self, chat: Chat, turns: tuple[Turn, ...], undone: tuple[Turn, ...] = (), *, partial: bool = False
    ) -> None:
        chat.transcript = replace(chat.transcript, turns=turns, undone=undone)
        note = chat.session.save(chat.transcript, partial=partial)
        conflict = self.model.save(chat.model, chat.transcript, partial=partial)
        assert (note is not None) == conflict
        assert (chat.session.number, chat.session.name) == (chat.model.number, chat.model.name)
        if note is not None:
            assert chat.session.name in note


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=int(os.environ.get("STORE_EXAMPLES", "20")),
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.soak
def test_sessions_for_long() -> None:
    """Guards: what twenty runs do not meet."""
    run_state_machine_as_test(Sessions, settings=settings(TestSessions.settings, max_examples=500))
