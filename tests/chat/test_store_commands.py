"""The commands for sessions, in a chat with the fake engine: what they do, say, ask and complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from support.fake_engine import FakeEngine

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.chat.attachments import Attachment
from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.commands.sessions import COMMANDS
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.store.sessions import Session, SessionStore
from dsmoe_local.chat.terminal.screen import ReplyView, Screen
from dsmoe_local.engine.types import SamplingParameters


class RecordingScreen:
    """Writes down all lines; `yes` is what it answers to questions."""

    width, height, plain, colour = 80, 24, True, False

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.yes = True

    def notice(self, text: str) -> None:
        self.lines.append(text)

    def error(self, error: DsmoeError) -> None:
        self.lines += str(error).splitlines()

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        self.lines += [" | ".join(row) for row in rows]

    def confirm(self, question: str) -> bool:
        self.lines.append(question)
        return self.yes

    def live(self, renderable: object) -> None:
        pass

    def show(self, renderable: object) -> None:
        self.lines.append(str(renderable))

    @contextmanager
    def reply(self, after: str = "") -> Iterator[ReplyView]:
        yield cast(ReplyView, self)

    def progress(self, done: int, total: int) -> None:
        pass

    def reasoning(self, piece: str) -> None:
        pass

    def reasons(self, n_tokens: int) -> None:
        pass

    def reasoned(self, summary: str) -> None:
        pass

    def text(self, piece: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.lines.append(text)


class Talk:
    """A chat, and what it says to one input."""

    def __init__(
        self,
        sessions: SessionStore | None,
        config: Path,
        settings: ChatSettings = ChatSettings(),  # noqa: B008 - frozen
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self.screen = RecordingScreen()
        self.engine = FakeEngine(lambda prompt: "Echo " + prompt.rsplit("\n", 1)[-1].removeprefix("user: "))
        conversation = Conversation(self.engine, settings)
        screen = cast(Screen, self.screen)
        self.chat = Chat(conversation, screen, ConfigFile(config), sessions=sessions, fixed=fixed)

    def take(self, text: str) -> list[str]:
        """What is said to the input, without the replies."""
        self.screen.lines.clear()
        self.chat.take(text)
        # It would keep the cache after a while.
        self.chat.close()
        return self.screen.lines

    def contents(self) -> list[str]:
        """What the conversation consists of."""
        return [turn.content for turn in self.chat.conversation.turns]

    def complete(self, name: str, typed: str) -> list[str]:
        """What a command offers."""
        return [*COMMANDS[name].complete(self.chat, typed)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    opened = SessionStore.open(tmp_path / "sessions")
    yield opened
    opened.close()


@pytest.fixture
def talk(store: SessionStore, tmp_path: Path) -> Talk:
    return Talk(store, tmp_path / "config.toml")


@pytest.fixture
def other(store: SessionStore, tmp_path: Path) -> Talk:
    return Talk(store, tmp_path / "config.toml")


def test_naming_before_and_after_the_first_message(talk: Talk, store: SessionStore) -> None:
    """Guards: a name given too early, which is lost."""
    assert talk.take("/save") == ["this session is saved from its first message on"]
    assert talk.take("/save Big plans") == ["this session is saved as Big plans from its first message on"]
    assert store.names() == []
    talk.take("hello")
    assert store.names() == ["Big plans"]
    assert talk.take("/save") == ["this session is Big plans, and is always saved"]
    assert talk.take("/save Small plans") == ["this session is Small plans, and is always saved"]
    assert store.names() == ["Small plans"]


def test_going_from_one_session_to_another(talk: Talk, store: SessionStore) -> None:
    """Guards: turns of one session that end up in another."""
    talk.take("first")
    talk.take("/save One")
    talk.take("/clear")
    talk.take("second")
    assert talk.take("/load one") == ["One", "> first", "Echo first"]
    assert talk.contents() == ["first", "Echo first"]
    assert talk.take("/load 1") == ["One is the current session"]
    talk.take("third")
    assert talk.take("/load 2") == ["chat-2", "> second", "Echo second"]
    assert talk.contents() == ["second", "Echo second"]
    assert talk.take("/load tow")[0] == "there is no session tow"
    assert talk.take("/load")[0].startswith("the name or number of a session")
    assert store.find("One").load("fake").turns[-1].content == "Echo third"


def test_loading_shows_where_a_session_is(talk: Talk) -> None:
    """Guards: /load that shows nothing of the session, or an attached file in place of the last question."""
    talk.take("one")
    frame = Attachment("notes.txt", "x\n" * 100).framed
    talk.take(f"{frame}\n\nwhat is this?")
    talk.take("/clear")
    assert talk.take("/load 1") == [
        "chat-1, 2 messages before these",
        "> [notes.txt] what is this?",
        "Echo what is this?",
    ]


def test_previews_show_what_was_typed(talk: Talk) -> None:
    """Guards: /undo, /delete, lists and /context that tell the attached file in place of the message."""
    talk.take(Attachment("notes.txt", "secret\n" * 100).framed + "\n\nwhat is this?")
    assert talk.take("/sessions")[0].split(" | ")[2] == "[notes.txt] what is this?"
    assert "user | " in talk.take("/context")[0]
    assert talk.take("/context")[0].endswith(" | [notes.txt] what is this?")
    talk.screen.yes = False
    assert talk.take("/delete 1")[0] == "Delete chat-1 (2 messages: “[notes.txt] what is this?”) permanently?"
    assert talk.take("/undo")[0].startswith("removed: “[notes.txt] what is this?” and its reply")


def test_undo_is_not_final(talk: Talk, other: Talk) -> None:
    """Guards: /undo 9 in place of /undo that loses a conversation, also for the chat that goes on with it."""
    for text in ("one", "two", "three"):
        talk.take(text)
    everything = talk.contents()
    talk.take("/undo 9")
    assert talk.contents() == []
    talk.take("/redo")
    assert talk.contents() == everything[:2]
    talk.take("/undo")
    other.take("/load 1")
    assert other.contents() == []
    other.take("/redo 2")
    assert other.contents() == everything[:4]
    other.take("/redo")
    assert other.contents() == everything
    assert other.take("/redo")[0].startswith("there is nothing to redo")
    ids = other.chat.conversation.turns[-1].token_ids
    assert ids == other.engine.encode("Echo three")


def test_settings_stay_with_their_session(talk: Talk, store: SessionStore, tmp_path: Path) -> None:
    """Guards: a conversation that goes on with other settings than it was held with."""
    talk.take("/set temperature 0.25")
    talk.take("hello")
    talk.take("/set top_k 7")
    talk.take("/clear")
    talk.take("other")
    talk.take("/set temperature 1.5")
    again = Talk(store, tmp_path / "config.toml")
    assert again.take("/load 1")[0] == "restored from this session: temperature 0.25, top_k 7"
    assert again.chat.conversation.settings.sampling.top_k == 7
    assert again.take("/load 2")[0] == "restored from this session: temperature 1.5"
    again.take("/set reset")
    again.take("/fork")
    assert again.chat.conversation.settings == ChatSettings()
    assert Talk(store, tmp_path / "config.toml").take("/load 2")[0] == "chat-2"


def test_flags_outweigh_what_a_session_was_held_with(store: SessionStore, tmp_path: Path) -> None:
    """Guards: a flag that is ignored since the session knows better, or that the session keeps."""
    talk = Talk(store, tmp_path / "config.toml")
    for setting in ("temperature 0.25", "top_k 7", "stop x"):
        talk.take(f"/set {setting}")
    talk.take("hello")
    base = ChatSettings(SamplingParameters(temperature=0.9))
    fixed = Talk(store, tmp_path / "config.toml", base, frozenset({"temperature"}))
    assert fixed.take("/load 1")[0] == 'restored from this session: top_k 7, stop ["x"]'
    assert fixed.chat.conversation.settings.sampling.temperature == 0.9
    fixed.take("/set top_k 8")
    talk = Talk(store, tmp_path / "config.toml")
    assert talk.take("/load 1")[0] == 'restored from this session: temperature 0.25, top_k 8, stop ["x"]'
    # What is set by hand counts more than the flag.
    fixed.take("/set temperature 0.5")
    fixed.take("/fork")
    assert fixed.chat.conversation.settings.sampling.temperature == 0.5


def test_settings_that_mean_nothing_here_are_kept(talk: Talk, store: SessionStore, tmp_path: Path) -> None:
    """Guards: a session of a later version that cannot be opened, or loses what this one does not know."""
    talk.take("hello")
    session = store.find("1")
    transcript = session.load("bytes")
    session.settings = {"warp": 9, "temp": -5.0, "top-k": 3}
    session.save(transcript)
    talk = Talk(store, tmp_path / "config.toml")
    assert talk.take("/load 1")[0] == "restored from this session: top_k 3"
    talk.take("more")
    again = store.find("1")
    again.load("bytes")
    assert again.settings == {"warp": 9, "temp": -5.0, "top-k": 3}


def test_the_list(talk: Talk) -> None:
    """Guards: a list without what tells sessions apart, or without an end."""
    assert talk.take("/sessions") == ["no sessions yet"]
    for number in range(1, 33):
        talk.take("/clear")
        talk.take(f"message {number}")
    lines = talk.take("/sessions")
    assert len(lines) == 31
    assert lines[0].startswith("*32 | chat-32 | message 32 | 2 messages, fake, 20")
    assert lines[1].startswith(" 31 | chat-31 | message 31 | 2 messages, fake, 20")
    assert lines[-1] == "and 2 older ones: /sessions all"
    assert len(talk.take("/sessions all")) == 32
    assert talk.take("/sessions some")[0] == "/sessions does not take 'some'"


def test_renaming_this_session_and_others(talk: Talk, other: Talk, store: SessionStore) -> None:
    """Guards: the wrong one renamed; a chat that goes on under its old name."""
    talk.take("a")
    other.take("b")
    assert talk.take("/rename My ideas") == ["chat-1 is now My ideas"]
    assert talk.take("/rename my ideas -> Better ideas") == ["My ideas is now Better ideas"]
    assert talk.take("/rename chat-2 -> Theirs") == ["chat-2 is now Theirs"]
    assert talk.take("/rename 2->Theirs again") == ["Theirs is now Theirs again"]
    assert other.chat.status().session == "Theirs again"
    # A name that begins as another session's, or with a number, is this session's.
    assert talk.take("/rename Theirs again and again") == ["Better ideas is now Theirs again and again"]
    assert talk.take("/rename 2 bottles") == ["Theirs again and again is now 2 bottles"]
    assert talk.take("/rename theirs AGAIN")[0] == "a session theirs AGAIN exists already"
    assert talk.take("/rename Theirs again -> THEIRS again") == ["Theirs again is now THEIRS again"]
    assert talk.take("/rename nobody -> x")[0] == "there is no session nobody"
    assert talk.take("/rename -> x")[0].startswith("the name or number of a session")
    assert talk.take("/rename THEIRS again ->")[0] == "the name of the session is missing"
    assert talk.take("/rename")[0] == "the name of the session is missing"
    assert store.names() == ["THEIRS again", "2 bottles"]


def test_deleting_asks(talk: Talk, store: SessionStore) -> None:
    """Guards: a session gone by a slip of the fingers; a deleted one that the chat stores again."""
    talk.take("first message")
    talk.take("/clear")
    talk.take("second message")
    talk.screen.yes = False
    assert talk.take("/delete chat-1") == [
        "Delete chat-1 (2 messages: “first message”) permanently?",
        "nothing was deleted",
    ]
    talk.screen.yes = True
    assert talk.take("/delete chat-1")[-1] == "chat-1 is deleted"
    assert talk.contents() == ["second message", "Echo second message"]
    assert talk.take("/delete chat-2")[-1] == "chat-2 is deleted: a new conversation"
    assert talk.contents() == []
    talk.take("/save")
    assert store.names() == []
    talk.take("third")
    assert store.names() == ["chat-3"]
    assert talk.take("/delete")[0].startswith("the name or number of a session")


def test_deleting_what_another_chat_deletes(
    talk: Talk, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: StopIteration that ends the chat, between finding a session and looking at it."""
    talk.take("first message")
    find = store.find

    def find_and_lose(text: str) -> Session:
        found = find(text)
        store.delete(found)
        return found

    monkeypatch.setattr(store, "find", find_and_lose)
    assert talk.take("/delete chat-1")[0] == "chat-1 was deleted by another program"


def test_a_session_that_was_never_answered_is_not_listed(talk: Talk, store: SessionStore) -> None:
    """Guards: a session of nothing for every message that was too long; one that cannot be deleted."""
    talk.take("hello")
    talk.take("/undo")
    assert talk.take("/sessions") == ["no sessions yet"]
    assert talk.take("/delete chat-1")[-1] == "chat-1 is deleted: a new conversation"


def test_searching(talk: Talk) -> None:
    """Guards: hits without a way to their session."""
    talk.take("混合专家模型 is a mixture of experts")
    talk.take("/clear")
    talk.take("dense")
    lines = talk.take("/search 专家 mixture")
    assert [line.rpartition(",")[0] for line in lines] == [
        "chat-1 | reply: Echo 混合专家模型 is a mixture of experts | message 2",
        "chat-1 | you: 混合专家模型 is a mixture of experts | message 1",
    ]
    assert talk.take("/search sparse") == ["nothing found"]
    assert talk.take('/search "') == ["nothing found"]
    assert talk.take("/search")[0] == "the words to search for are missing"


def test_forking(talk: Talk, store: SessionStore) -> None:
    """Guards: a fork that changes its original, or is read again."""
    assert talk.take("/fork")[0] == "there is nothing to fork yet"
    talk.take("common")
    said = talk.take("/fork")[-1]
    assert said == "this is now chat-1 2; chat-1 is unchanged: /load chat-1 opens it"
    talk.take("only here")
    ids = talk.engine.encode("Echo common")
    sent = talk.engine.requests[-1].prompt
    assert any(sent[at : at + len(ids)] == ids for at in range(len(sent)))
    assert talk.take("/fork chat-1")[0] == "a session chat-1 exists already"
    talk.take("/fork Third")
    assert store.names()[0] == "Third"
    assert len(store.find("chat-1").load("").turns) == 2
    assert len(store.find("Third").load("").turns) == 4


@pytest.mark.parametrize("name", COMMANDS)
def test_without_history_nothing_is_kept(name: str, tmp_path: Path) -> None:
    """Guards: a command that pretends to keep something, or a traceback."""
    talk = Talk(None, tmp_path / "config.toml")
    talk.take("a")
    assert talk.take(f"/{name} x") == ["this chat is not stored", "start it without --no-history"]
    assert talk.complete(name, "x") in ([], ["all"])


def test_names_are_completed(talk: Talk, store: SessionStore) -> None:
    """Guards: names with spaces that are completed at the wrong place; keys that raise errors."""
    for name in ("My plans for May", "my notes", "other"):
        talk.take("/clear")
        talk.take("/save " + name)
        talk.take("x")
    assert talk.complete("load", "") == ["other", "my notes", "My plans for May"]
    assert talk.complete("load", "MY") == ["my notes", "My plans for May"]
    assert talk.complete("delete", "my p") == ["plans for May"]
    assert talk.complete("rename", "my plans ") == ["for May"]
    assert talk.complete("rename", "my notes ") == ["->"]
    assert talk.complete("rename", "my notes -> o") == []
    assert talk.complete("sessions", "") == ["all"]
    assert talk.complete("load", "none") == []
    store.close()
    assert talk.complete("load", "") == []
