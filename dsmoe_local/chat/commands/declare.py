"""How a slash command is declared: one declaration gives behaviour, help and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from dsmoe_local.base.config_file import ConfigFile
    from dsmoe_local.chat.conversation import Conversation, Reply
    from dsmoe_local.chat.experts_view import ExpertsView
    from dsmoe_local.chat.store.sessions import Session, SessionStore
    from dsmoe_local.chat.terminal.screen import Screen

_DIGITS = 9


class Chat(Protocol):
    """What commands act on. `chat.Chat` is one; commands run in its worker's thread, one at a time."""

    conversation: Conversation
    screen: Screen
    sessions: SessionStore | None  # None: --no-history
    session: Session | None  # None: nothing is stored yet
    config: ConfigFile
    experts: ExpertsView
    finished: bool

    def send(self, text: str) -> None:
        """Have a message answered; files that it names with @ are put in."""
        ...

    def show_reply(self, action: Callable[[Conversation], Reply], after: str = "") -> None:
        """Print the reply whose events `action` returns; afterwards it is durable.

        `after` is the text that the reply goes on with, if it does.
        """
        ...

    def advise(self) -> None:
        """Warn, quietly, of a system text that the model was not trained with."""
        ...

    def save(self) -> None:
        """Make durable what a command changed in the conversation: turns, system text."""
        ...

    def current_session(self, sessions: SessionStore) -> Session:
        """The session of this chat, which begins to exist here if need be."""
        ...

    def adopt(self, session: Session | None) -> None:
        """Go on with another session (None: a new one), once this one is saved."""
        ...

    def recall(self) -> None:
        """Show the last message and reply of the session that goes on."""
        ...


Complete: TypeAlias = Callable[[Chat, str], Iterable[str]]
"""Takes what is typed behind a command's name, up to the cursor; gives what its last word could become."""


def no_words(chat: Chat, typed: str) -> Iterable[str]:
    """The completion of commands that take none."""
    return ()


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command. `run` gets the chat and what follows the name, stripped; it raises DsmoeErrors.

    `arguments` in words for the help: `[NAME [VALUE]]`. `files`: the last word is completed as a file's name,
    beside what `complete` gives.
    """

    run: Callable[[Chat, str], None]
    help: str
    arguments: str = ""
    aliases: tuple[str, ...] = ()
    complete: Complete = no_words
    files: bool = False


def read_count(text: str) -> int | None:
    """The whole number, from 0 on, that a command is given; None for anything else."""
    # int() refuses thousands of digits, which are ASCII digits all the same.
    return int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else None


Commands: TypeAlias = Mapping[str, Command]
"""Commands by name, in the order of the help."""
