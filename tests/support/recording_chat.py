"""A chat whose screen writes down what it is told, for the tests of commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.conversation import Conversation, Event
from dsmoe_local.chat.settings import ChatSettings
from support.fake_engine import FakeEngine


class RecordingScreen:
    """Answers `answers` to questions, in turn; `copied` is the clipboard."""

    def __init__(self, *answers: bool) -> None:
        self.notices: list[str] = []
        self.questions: list[str] = []
        self.copied: list[str] = []
        self._answers = list(answers)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def confirm(self, question: str) -> bool:
        self.questions.append(question)
        return self._answers.pop(0)

    def copy(self, text: str) -> str:
        self.copied.append(text)
        return "tests"


class RecordingExperts:
    """The view of the experts, as far as exports need it."""

    def __init__(self) -> None:
        self.exported: list[Path] = []

    def export(self, path: Path) -> None:
        self.exported.append(path)


class RecordingChat:
    """A conversation with the fake engine, without a terminal and without sessions."""

    def __init__(self, *answers: bool, engine: FakeEngine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.conversation = Conversation(self.engine, ChatSettings())
        self.screen = RecordingScreen(*answers)
        self.experts = RecordingExperts()
        self.session = None

    def show_reply(self, action: Callable[[Conversation], Iterable[Event]], after: str = "") -> None:
        list(action(self.conversation))

    def say(self, text: str) -> None:
        """Have a message answered."""
        self.show_reply(lambda conversation: conversation.send(text))

    @property
    def as_chat(self) -> Chat:
        """What commands take."""
        return cast(Chat, self)
