"""A reply that is stored while it grows: how often, what a kill leaves, and that it goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.talking import chat_with

from dsmoe_local.base.errors import NoSpaceError
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.saving import Drafts
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.turns import Transcript, Turn
from dsmoe_local.engine.types import FinishReason

REPLY = "Die Größe 🚀 zählt."


class Clock:
    """Every look at it takes `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Always(Drafts):
    """Saves with every token."""

    def keep(self, partial: Callable[[], Transcript | None], save: Callable[[Transcript], None]) -> None:
        if self._next < math.inf:
            self._next = 0.0
        super().keep(partial, save)


def stored(store: SessionStore) -> Transcript:
    """What a chat that begins now would go on with."""
    latest = store.latest()
    return Transcript() if latest is None else latest.load("bytes")


def finished(rest: str, transcript: Transcript, settings: ChatSettings) -> Turn:
    """The reply, once it was continued."""
    conversation = Conversation(FakeEngine(replies=[rest]), settings)
    conversation.restore(transcript)
    list(conversation.continue_reply())
    return conversation.turns[-1]


def test_kill_at_any_token_loses_none_that_was_stored(store: SessionStore) -> None:
    """Guards: seven minutes of a reply lost with the process; half a character taken for text."""
    seen: list[Transcript] = []
    engine = FakeEngine(replies=[REPLY], gate=lambda index: seen.append(stored(store)))
    chat, _ = chat_with(engine, store, drafts=Always())
    chat.take("q")
    chat.close()
    whole, encoded = stored(store), REPLY.encode()
    assert whole.turns[-1].content == REPLY
    assert seen[0].turns == whole.turns[:1]
    for n_tokens, transcript in enumerate(seen[1:], 1):
        reply = transcript.turns[-1]
        assert reply.token_ids == whole.turns[-1].token_ids[:n_tokens]
        assert reply.content == encoded[:n_tokens].decode(errors="ignore")
        assert reply.ending is FinishReason.CANCELLED


def test_what_was_stored_goes_on_exactly(store: SessionStore) -> None:
    """Guards: text that is held back, since it may begin a stop string, missing from a reply that goes on."""
    settings = ChatSettings(stop=("END!", "\n\n"))
    text = "an ENvelope END, \nE END\n END"
    seen: list[Transcript] = []
    engine = FakeEngine(replies=[text], gate=lambda index: seen.append(stored(store)))
    chat, _ = chat_with(engine, store, drafts=Always(), settings=settings)
    chat.take("q")
    chat.close()
    whole = stored(store).turns[-1]
    assert whole.content == text
    checked = 0
    for transcript in seen:
        n_ids = len(transcript.turns[-1].token_ids)
        rest = finished(text[n_ids:], transcript, settings)
        assert (rest.content, rest.token_ids) == (whole.content, whole.token_ids)
        checked += 0 < n_ids < len(text)
    assert checked > 10


def test_chat_goes_on_with_what_was_stored(store: SessionStore, other: SessionStore) -> None:
    """Guards: a reply that was cut off by a kill without a word, or that /continue answers anew."""
    copies: list[Transcript] = []

    def look(index: int) -> None:
        if index == 4:
            # As after a kill: another program begins while nothing more is written.
            chat, screen = chat_with(FakeEngine(replies=["ef"]), other, drafts=Always())
            chat.begin(other.latest())
            assert "stopped: /continue continues it" in screen.said
            chat.take("/continue")
            chat.close()
            copies.append(stored(other))

    chat, screen = chat_with(FakeEngine(replies=["abcdef"], gate=look), store, drafts=Always())
    chat.take("q")
    chat.close()
    assert [turn.content for turn in copies[0].turns] == ["q", "abcdef"]
    # And the first one, which was alive after all, has lost nothing.
    assert "another program has changed chat-1: this chat is now the session chat-1 2" in screen.said
    assert [store.find(name).load("bytes").turns[-1].content for name in ("chat-1", "chat-1 2")] == [
        "abcdef"
    ] * 2


@pytest.mark.parametrize("command", ["/regen", "/edit other"])
def test_reply_in_place_of_another(store: SessionStore, command: str) -> None:
    """Guards: a kill in the middle of /regen or /edit that loses the old reply and the new one."""
    seen: list[Transcript] = []
    engine = FakeEngine(replies=["first", "second"], gate=lambda index: seen.append(stored(store)))
    chat, _ = chat_with(engine, store, drafts=Always())
    chat.take("q")
    seen.clear()
    chat.take(command)
    question = "other" if "other" in command else "q"
    assert [turn.content for turn in seen[0].turns] == ["q", "first"]
    assert [turn.content for turn in seen[3].turns] == [question, "sec"]
    assert [turn.content for turn in stored(store).turns] == [question, "second"]
    chat.close()


def test_continued_reply_grows(store: SessionStore) -> None:
    """Guards: the first half of a reply lost while the second is written."""
    seen: list[Transcript] = []
    engine = FakeEngine(replies=["abcdef", "ef"], gate=lambda index: seen.append(stored(store)))
    chat, _ = chat_with(engine, store, drafts=Always())
    chat.take("/set max_tokens 4")
    chat.take("q")
    seen.clear()
    chat.take("/continue")
    assert [turns.turns[-1].content for turns in seen] == ["abcd", "abcde"]
    assert [turn.content for turn in stored(store).turns] == ["q", "abcdef"]
    chat.close()


def test_full_disk_ends_no_reply(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a reply broken off since it could not be stored yet; a word about it for every token."""
    chat, screen = chat_with(FakeEngine(replies=["abcdef"]), store, drafts=Always())
    session = chat.current_session(store)
    save, attempts = session.save, 0

    def fail(transcript: Transcript, *, partial: bool = False) -> str | None:
        nonlocal attempts
        if partial:
            attempts += 1
            raise NoSpaceError("the disk is full")
        return save(transcript)

    monkeypatch.setattr(session, "save", fail)
    chat.take("q")
    assert screen.notices == ["[not saved yet: the disk is full]"]
    assert attempts == 1
    assert stored(store).turns[-1].content == "abcdef"
    chat.close()


@given(step=st.floats(0.01, 5.0), cost=st.floats(0.0, 30.0), n_tokens=st.integers(1, 300))
def test_how_often(step: float, cost: float, n_tokens: int) -> None:
    """Guards: a disk that is written to for every token, or a slow one that a reply waits for."""
    clock = Clock(step)
    drafts = Drafts(clock)
    drafts.begin()
    spent: list[float] = []

    def save(transcript: Transcript) -> None:
        spent.append(clock.now)
        clock.now += cost

    for _ in range(n_tokens):
        drafts.keep(Transcript, save)
    assert all(later - earlier >= max(2.0, 20 * cost) for earlier, later in pairwise(spent))
    longest = max(2.0, 20 * (cost + step)) + cost + 4 * step
    assert len(spent) >= clock.now // longest - 1


def test_nothing_is_stored_before_there_is_something(store: SessionStore) -> None:
    """Guards: an empty reply stored while the prompt is still being read."""
    drafts = Always()
    drafts.begin()
    drafts.keep(lambda: None, lambda transcript: pytest.fail("stored"))
    assert Conversation(FakeEngine(), ChatSettings()).partial_transcript is None
