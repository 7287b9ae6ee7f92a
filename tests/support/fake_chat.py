"""`python -m support.fake_chat`: the chat with a fake engine, whose replies halt at a `#` until cancelled."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.base.paths import data_folder
from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.commands.completion import choices
from dsmoe_local.chat.commands.table import COMMANDS
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.saving import Drafts
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.terminal import open_terminal
from dsmoe_local.engine.errors import EngineCrashError
from support.fake_engine import FakeEngine


class HaltingEngine(FakeEngine):
    """Echoes the question. A `#` in it halts the reply there until Ctrl-C, a `!` crashes the engine there."""

    def __init__(self, *, template: bool, reasons: bool, n_context: int) -> None:
        super().__init__(
            self._answer, template=template, reasons=reasons, gate=self._halt, n_context=n_context
        )
        self._places: dict[int, str] = {}
        self._halted = False

    def _answer(self, prompt: str) -> str:
        question = prompt.rsplit("user: ", 1)[-1].encode()
        self._places = {index: mark for mark in "#!" if (index := question.find(mark.encode())) >= 0}
        return question.decode().replace("#", "").replace("!", "")

    def _halt(self, index: int) -> None:
        mark = self._places.get(index)
        if mark == "!":
            self.kill()
            raise EngineCrashError("the engine's process was killed by SIGSEGV")
        if mark == "#":
            # Not an Event: a signal handler in this thread could not set it without a deadlock.
            self._halted = True
            while self._halted:
                time.sleep(0.01)

    def cancel_all(self) -> None:
        super().cancel_all()
        self._halted = False


def main() -> None:
    """Run the chat. Arguments: `base` for a model without a template, `reasons` for one that reasons,
    `plain`, `latest` to continue the latest session, a number for the size of the context, `no-drafts` to
    store no reply before it ends.
    """
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    engine = HaltingEngine(
        template="base" not in sys.argv,
        reasons="reasons" in sys.argv,
        n_context=numbers[0] if numbers else 4096,
    )
    folder = data_folder() / "sessions"
    sessions = SessionStore.open(folder)
    screen = open_terminal(
        plain="plain" in sys.argv,
        status=lambda: chat.status(),
        complete=lambda before: choices(before, COMMANDS, chat),
        history_path=data_folder() / "history",
    )
    chat = Chat(
        Conversation(engine, ChatSettings()),
        screen,
        ConfigFile(Path("config.toml")),
        sessions=sessions,
        # Drafts are stored after some time.
        drafts=Drafts(clock=lambda: 0.0) if "no-drafts" in sys.argv else None,
    )
    chat.begin(sessions.latest() if "latest" in sys.argv else None)
    try:
        screen.run(chat.take, chat.cancel, chat.kill)
    finally:
        chat.close()
        sessions.close()


if __name__ == "__main__":
    main()
