"""A chat as a whole: what is on the disk when, what is cancelled, what a crash and a full disk leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.talking import TalkingScreen, chat_with

from dsmoe_local.base.errors import NoSpaceError
from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.saving import CacheKeeper
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.chat.turns import Transcript
from dsmoe_local.engine.errors import EngineCrashError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    """A store of its own."""
    sessions = SessionStore.open(tmp_path / "sessions")
    yield sessions
    sessions.close()


def stored(store: SessionStore) -> list[str]:
    """The turns on the disk of the session that was saved last."""
    latest = store.latest()
    return [] if latest is None else [turn.content for turn in latest.load("bytes").turns]


class FullDisk:
    """Makes saving fail while `full`."""

    def __init__(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        assert chat.session is not None
        save = chat.session.save

        def fail(transcript: Transcript) -> str | None:
            if self.full:
                raise NoSpaceError("the disk is full")
            return save(transcript)

        monkeypatch.setattr(chat.session, "save", fail)


def test_question_is_on_the_disk_before_its_answer(store: SessionStore) -> None:
    """Guards: a message that is lost when the chat dies in the middle of the reply."""
    seen: list[list[str]] = []
    chat, _ = chat_with(FakeEngine(replies=["a"], gate=lambda index: seen.append(stored(store))), store)
    chat.take("q")
    assert seen == [["q"]]
    assert stored(store) == ["q", "a"]
    chat.close()


@pytest.mark.parametrize("command", ["/regen", "/edit other"])
def test_reply_is_on_the_disk_until_there_is_another(store: SessionStore, command: str) -> None:
    """Guards: a kill in the middle of /regen or /edit losing both replies."""
    seen: list[list[str]] = []
    chat, _ = chat_with(
        FakeEngine(replies=["first", "second"], gate=lambda index: seen.append(stored(store))), store
    )
    chat.take("q")
    seen.clear()
    chat.take(command)
    assert seen[0] == ["q", "first"]
    assert stored(store)[-1] == "second"
    chat.close()


def test_full_disk_loses_nothing(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a reply dropped from memory when the disk was full; /clear that drops what was not saved."""
    chat, screen = chat_with(FakeEngine(lambda prompt: prompt[-1] * 3), store)
    chat.take("a")
    disk = FullDisk(chat, monkeypatch)
    disk.full = True
    chat.take("b")
    assert [turn.content for turn in chat.conversation.turns] == ["a", "aaa", "b"]
    chat.take("/clear")
    assert "the disk is full" in screen.said
    assert chat.conversation.turns
    disk.full = False
    chat.take("/continue")
    assert stored(store) == ["a", "aaa", "b", "bbb"]
    chat.close()


def test_reply_whose_showing_fails_is_kept(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a partial reply lost since the terminal went away under it."""
    chat, screen = chat_with(FakeEngine(replies=["abcdef"]), store)

    def fail(piece: str) -> None:
        if piece == "d":
            raise OSError("the terminal is gone")

    monkeypatch.setattr(screen, "text", fail)
    with pytest.raises(OSError, match="gone"):
        chat.take("q")
    assert stored(store) == ["q", "abcd"]
    chat.close()


def test_crash_is_told_whatever_the_disk_does(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a full disk hiding that the engine died."""

    def die(index: int) -> None:
        if deadly:
            disk.full = True
            raise EngineCrashError("the engine was killed by SIGSEGV")

    deadly = False
    chat, screen = chat_with(FakeEngine(gate=die), store)
    chat.take("a")
    disk = FullDisk(chat, monkeypatch)
    deadly = True
    chat.take("b")
    assert [error.what for error in screen.errors] == ["the disk is full", "the engine was killed by SIGSEGV"]
    disk.full = False
    chat.close()


def test_cancel_before_there_is_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a Ctrl-C that is lost while the message waits, or its files are read."""
    chat, screen = chat_with(FakeEngine())
    waiting = threading.Event()
    send = chat.send

    def slowly(text: str) -> None:
        waiting.set()
        chat.cancel()
        send(text)

    monkeypatch.setattr(chat, "send", slowly)
    chat.take("question")
    assert waiting.is_set()
    assert screen.replies == [""]
    assert "stopped: /continue" in screen.said
    monkeypatch.undo()
    chat.take("/continue")
    assert screen.replies[-1] == "user: question"
    chat.close()


def test_stopped_regeneration_says_what_stays() -> None:
    """Guards: an offer to continue a reply that is complete."""
    chat, screen = chat_with(
        FakeEngine(replies=["one", "two"], gate=lambda index: chat.cancel() if stop else None)
    )
    stop = False
    chat.take("q")
    stop = True
    chat.take("/regen")
    assert screen.notices[-1] == "[stopped: the old reply stays]"
    assert [turn.content for turn in chat.conversation.turns] == ["q", "one"]
    chat.close()


def test_cache_is_kept_and_found(store: SessionStore, tmp_path: Path) -> None:
    """Guards: a cache that is written in vain, or not waited for on leaving."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")

    def engine() -> FakeEngine:
        # A conversation's text ends otherwise in the fake than what it was generated from.
        fake = FakeEngine(lambda prompt: "y" * 200, template=False)
        fake.options = type(fake.options)(model)
        return fake

    first = engine()
    caches = CacheKeeper(StateStore(tmp_path / "sessions"))
    chat, _ = chat_with(first, store, caches)
    chat.take("q")
    working = chat._storing._working
    working.acquire()
    threading.Timer(0.05, working.release).start()
    chat.close()
    assert [count for _, count in first.saved] == [BLOCK, 2 * BLOCK, 3 * BLOCK]
    second = engine()
    chat, _ = chat_with(second, store, CacheKeeper(StateStore(tmp_path / "sessions")))
    chat.begin(store.latest())
    assert [count for _, count in second.loaded] == [count for _, count in first.saved]
    chat.close()
    # It is there already.
    assert second.saved == []


class Slow(FakeEngine):
    """Saves its cache after `meanwhile`, which is called with the number of blocks that were saved."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: "y" * 500, template=False)
        self.meanwhile: Callable[[int], None] = lambda n_blocks: None

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        self.meanwhile(len(self.saved))
        return super().save_cache(path, token_ids, start)


def test_a_message_does_not_wait_for_the_cache(store: SessionStore, tmp_path: Path) -> None:
    """Guards: hundreds of megabytes written, silently, before a message is answered."""
    engine = Slow()
    caches = CacheKeeper(StateStore(tmp_path / "sessions"))
    chat, screen = chat_with(engine, store, caches)
    chat.take("q")
    asking: list[threading.Thread] = []
    notes: list[str] = []

    def ask(n_blocks: int) -> None:
        notes.append(chat.status().note)
        if n_blocks == 1:
            asking.append(threading.Thread(target=chat.take, args=("more",)))
            asking[0].start()
            assert chat._storing._stopped.wait(60)

    engine.meanwhile = ask
    chat._storing.store_while_idle()
    asking[0].join()
    # The block that was being written, and none behind it.
    assert [count for _, count in engine.saved] == [BLOCK, 2 * BLOCK]
    assert notes == ["storing the cache"] * 2
    assert chat.status().note == ""
    assert len(screen.replies) == 2
    engine.meanwhile = lambda n_blocks: None
    chat.close()
    assert len(engine.saved) > 2


def test_leaving_tells_of_a_large_cache_and_can_leave_it_out(store: SessionStore, tmp_path: Path) -> None:
    """Guards: a chat that seems to hang when it is left, and ends with a traceback when that is cut short."""
    engine = Slow()
    chat, screen = chat_with(engine, store, CacheKeeper(StateStore(tmp_path / "sessions")))
    chat.take("q" * 1000)

    def interrupt(n_blocks: int) -> None:
        if n_blocks == 3:
            raise KeyboardInterrupt

    engine.meanwhile = interrupt
    chat.close()
    assert "storing the cache of 1,500 tokens: Ctrl-C skips it" in screen.said
    assert "the cache is not stored" in screen.said
    assert len(engine.saved) == 3


def test_a_signal_leaves_the_cache_out(store: SessionStore, tmp_path: Path) -> None:
    """Guards: a chat that writes hundreds of megabytes after SIGTERM, which gives it seconds."""
    engine = Slow()
    chat, _ = chat_with(engine, store, CacheKeeper(StateStore(tmp_path / "sessions")))
    chat.take("q")
    chat.close(keep=False)
    assert engine.saved == []
    assert [turn.content for turn in chat.conversation.turns] == stored(store)


def test_ctrl_c_goes_on_to_the_other_session_at_once(store: SessionStore, tmp_path: Path) -> None:
    """Guards: /load and /clear that wait for the cache of the session that is left, whatever one does."""
    engine = Slow()
    chat, screen = chat_with(engine, store, CacheKeeper(StateStore(tmp_path / "sessions")))
    chat.take("q" * 1000)
    engine.meanwhile = lambda n_blocks: chat.cancel()
    chat.take("/clear")
    assert "storing the cache of 1,500 tokens" in screen.said
    assert len(engine.saved) == 1
    assert chat.conversation.turns == ()
    chat.close()


def test_dead_engine_is_not_loaded_to_keep_its_cache(store: SessionStore, tmp_path: Path) -> None:
    """Guards: leaving after a crash that loads a whole model only to save nothing."""
    engine = FakeEngine(lambda prompt: "y" * 200)
    chat, _ = chat_with(engine, store, CacheKeeper(StateStore(tmp_path / "sessions")))
    chat.take("q")
    engine.kill()
    chat._storing.store_while_idle()
    chat.take("/undo")
    chat.close()
    assert engine.crashes == 0


def test_session_keeps_its_system_text(store: SessionStore) -> None:
    """Guards: a default from the config file in place of what the session was told."""
    chat, _ = chat_with(FakeEngine(), store)
    chat.begin(system="You are a pirate.")
    chat.take("q")
    chat.close()
    chat, _ = chat_with(FakeEngine(), store)
    chat.begin(store.latest())
    assert chat.conversation.system == "You are a pirate."
    chat.begin(store.latest(), system="Be brief.")
    assert chat.conversation.system == "Be brief."
    chat.close()


def test_long_lines_are_not_recalled_whole(store: SessionStore) -> None:
    """Guards: a session that goes on by printing a book."""
    chat, _ = chat_with(FakeEngine(replies=["ok"], n_context=100_000), store)
    chat.take("x" * 50_000)
    chat.close()
    chat, screen = chat_with(FakeEngine(n_context=100_000), store)
    chat.begin(store.latest())
    assert sum(map(len, screen.shown)) < 2_000
    chat.close()


def test_screen_of_tests_is_a_screen() -> None:
    """Guards: a screen for tests that answers otherwise than real ones."""
    assert TalkingScreen().plain is False


def test_the_speed_is_that_of_the_running_engine() -> None:
    """Guards: the status bar showing the speed of a process that is gone."""
    speeds: list[float] = []
    engine = FakeEngine(
        replies=["abc", "d"], gate=lambda index: speeds.append(chat.status().tokens_per_second)
    )
    chat, _ = chat_with(engine)
    chat.take("q")
    assert chat.status().tokens_per_second > 0
    engine.kill()
    chat.take("q")
    chat.close()
    assert set(speeds) == {0.0}
