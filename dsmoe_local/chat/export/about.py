"""What an exported conversation says beside its turns: title, model, time, how a reply ended. No format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from dsmoe_local.base.text import safe_file_line, safe_file_text
from dsmoe_local.chat import words
from dsmoe_local.chat.frames import without_files
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason

_TITLE_LENGTH = 60
_REMARKS: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "cut: the longest reply allowed was reached",
    FinishReason.CONTEXT_FULL: "cut: the context was full",
    FinishReason.CANCELLED: "stopped by the user",
}


@dataclass(frozen=True, slots=True)
class About:
    """What is said about a conversation. `vocabulary` is ModelInfo's: what the token ids belong to."""

    title: str
    model: str
    exported: datetime
    vocabulary: str = ""

    def facts(self, transcript: Transcript) -> str:
        """Model, time and length on one line of safe text."""
        length = words.count(len(transcript.turns), "turn")
        when = f"{self.exported:%Y-%m-%d %H:%M}"
        return f"{self.model_name} · {when} · {length}"

    def speaker(self, turn: Turn) -> str:
        """Who said it, safe to print."""
        return "You" if turn.role is Role.USER else self.model_name

    @property
    def model_name(self) -> str:
        """The model's name, safe to print."""
        return safe_file_line(self.model).strip() or "Model"


def title_of(transcript: Transcript) -> str:
    """The beginning of the first message, on one line."""
    first = without_files(transcript.turns[0].content).strip() if transcript.turns else ""
    return safe_file_line(" ".join(first[: 4 * _TITLE_LENGTH].split()), _TITLE_LENGTH) or "Conversation"


def remark(turn: Turn) -> str:
    """How a reply ended that did not end by itself; empty for others."""
    return _REMARKS.get(turn.ending, "") if turn.ending is not None else ""


def body(turn: Turn) -> str:
    """The text of a turn, safe to print, without the empty lines around it.

    The whitespace that a reply begins with belongs to the template.
    """
    text = safe_file_text(turn.content.replace("\r\n", "\n")).strip("\n")
    return text.strip() if turn.role is Role.ASSISTANT else text
