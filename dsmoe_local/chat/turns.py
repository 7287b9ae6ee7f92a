"""The turns of a conversation: plain data that the conversation, the store and exports share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dsmoe_local.engine.types import FinishReason, Message, Usage


class Role(StrEnum):
    """Who said it. The system text is the conversation's, not a turn."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, or the reply to one.

    Of a reply, `token_ids` are the exact ids (empty: not known, its text stands for it), `ending` says why it
    ended and `usage` what it took.
    """

    role: Role
    content: str
    token_ids: tuple[int, ...] = ()
    ending: FinishReason | None = None
    usage: Usage | None = None

    @property
    def message(self) -> Message:
        """The turn as the engine takes it."""
        return Message(self.role, self.content, self.token_ids)

    @property
    def unfinished(self) -> bool:
        """Whether it is a reply that was cut or stopped."""
        return self.role is Role.ASSISTANT and self.ending not in (None, FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation as it is kept: all its turns, and how many of the oldest have left the context.

    `n_left_out` whole turns (compact), and `n_shifted` tokens behind the system text of what is left (shift).
    A transcript may end with a message that has no reply yet. `undone` turns followed it before they were
    taken back.
    """

    turns: tuple[Turn, ...] = ()
    system: str = ""
    n_left_out: int = 0
    n_shifted: int = 0
    undone: tuple[Turn, ...] = ()
