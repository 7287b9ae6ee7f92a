"""The turns of a conversation as plain data, shared by the conversation, the store and exports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from dsmoe_local.engine.types import FinishReason, Message, Usage


class Role(StrEnum):
    """Who wrote a turn. The system text is not a turn."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message or a reply.

    A reply has its exact `token_ids` (empty: not known), the reason why it ended and its `usage`. `reasoning`
    is what a reasoning model wrote before `content`; the ids include it.
    """

    role: Role
    content: str
    token_ids: tuple[int, ...] = ()
    ending: FinishReason | None = None
    usage: Usage | None = None
    reasoning: str = ""

    @property
    def message(self) -> Message:
        """The turn as a message for the engine."""
        return Message(self.role, self.content, self.token_ids, self.reasoning)

    @property
    def unfinished(self) -> bool:
        """Whether this is a reply that was cut or stopped."""
        return self.role is Role.ASSISTANT and self.ending not in (None, FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class Transcript:
    """All turns of a conversation, and how much of it is no longer in the context.

    The first `n_left_out` turns are not in it (compact), nor the first `n_shifted` tokens after the system
    text (shift). The last turn may be a message without a reply. `undone` are the turns that /redo
    restores.
    """

    turns: tuple[Turn, ...] = ()
    system: str = ""
    n_left_out: int = 0
    n_shifted: int = 0
    undone: tuple[Turn, ...] = ()

    def without_token_ids(self) -> Transcript:
        """Return the transcript for a model with another vocabulary, in which ids mean something else."""
        turns, undone = (
            tuple(replace(turn, token_ids=()) for turn in each) for each in (self.turns, self.undone)
        )
        return replace(self, turns=turns, undone=undone, n_shifted=0)
