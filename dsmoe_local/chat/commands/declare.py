"""The declaration of a slash command: its function, help and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from dsmoe_local.base.config_file import ConfigFile
    from dsmoe_local.chat.conversation import Conversation, Reply
    from dsmoe_local.chat.experts_view import ExpertsView
    from dsmoe_local.chat.store.sessions import Session, SessionStore
    from dsmoe_local.chat.terminal.screen import Screen
    from dsmoe_local.engine.types import ModelOptions

_DIGITS = 9


class Chat(Protocol):
    """The part of `chat.Chat` that commands use. They run in its worker thread, one at a time."""

    conversation: Conversation
    screen: Screen
    sessions: SessionStore | None  # None: --no-history
    session: Session | None  # None: nothing is stored yet
    config: ConfigFile
    experts: ExpertsView
    finished: bool
    models_folder: Path
    options: ModelOptions  # with which the user started

    def send(self, text: str) -> None:
        """Send a message, with the files that it mentions as @file, and show the reply."""
        ...

    def show_reply(self, action: Callable[[Conversation], Reply], after: str = "") -> None:
        """Show and save the reply whose events `action` returns. `after` is the text that it continues."""
        ...

    def advise(self) -> None:
        """Show a note if the model was not trained with a system text, and there is one."""
        ...

    def save(self) -> None:
        """Save the conversation if it has changed."""
        ...

    def current_session(self, sessions: SessionStore) -> Session:
        """Return the session of this chat; create it if there is none yet."""
        ...

    def adopt(self, session: Session | None) -> None:
        """Save this session and switch to another one (None: a new one)."""
        ...

    def switch_model(self, load: Callable[[], None]) -> None:
        """Continue the conversation with another model, which `load` loads. If it fails, keep the old one."""
        ...

    def recall(self) -> None:
        """Show the last message and reply of the session."""
        ...


Complete: TypeAlias = Callable[[Chat, str], Iterable[str]]
"""Takes the text between a command's name and the cursor, and returns completions of its last word."""


def no_words(chat: Chat, typed: str) -> Iterable[str]:
    """Return no completions."""
    return ()


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command. `run` gets the chat and the stripped text after the name, and may raise DsmoeErrors.

    `arguments` are for the help: `[NAME [VALUE]]`. `files`: the last word is also completed as a file name.
    `local`: the command needs a model on this computer.
    """

    run: Callable[[Chat, str], None]
    help: str
    arguments: str = ""
    aliases: tuple[str, ...] = ()
    complete: Complete = no_words
    files: bool = False
    local: bool = False


def read_count(text: str) -> int | None:
    """Return a number in a command's argument, at least 0; None for anything else."""
    # int() raises for thousands of digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else None


Commands: TypeAlias = Mapping[str, Command]
"""Commands by name, in the order of the help."""
