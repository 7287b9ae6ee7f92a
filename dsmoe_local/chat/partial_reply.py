"""A reply that is being generated: its text, its token ids, and its tool calls as text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.types import CallDelta, FinishReason, TokenEvent, Usage


@dataclass(slots=True)
class PartialReply:
    """The running reply so far. Its first `n_ids` tokens decode to exactly its first `n_pieces` pieces.

    A piece is a pair of texts: of the answer, and of the reasoning.
    """

    pieces: list[tuple[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    n_pieces: int = 0
    n_ids: int = 0

    def add(self, event: TokenEvent) -> None:
        """Add an event."""
        self.pieces.append((event.text, event.reasoning))
        if event.finish_reason is FinishReason.STOP and event.token_id is None:
            # A stop string ended it: the ids include text after the end.
            self.ids.clear()
        elif event.finish_reason is None and event.token_id is not None:
            self.ids.append(event.token_id)
        if not event.held:
            self.n_pieces, self.n_ids = len(self.pieces), len(self.ids)

    def exact(self) -> PartialReply:
        """Return the reply up to the last point where texts and ids are complete."""
        return PartialReply(self.pieces[: self.n_pieces], self.ids[: self.n_ids])

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(answer for answer, _ in self.pieces)

    @property
    def reasoning(self) -> str:
        """The reasoning before the answer."""
        return "".join(reasoning for _, reasoning in self.pieces)

    def added_to(
        self, turns: tuple[Turn, ...], ending: FinishReason | None, usage: Usage | None
    ) -> tuple[Turn, ...]:
        """Return turns with this reply as a new one, or as the continuation of the last reply."""
        *before, last = turns
        ids = tuple(self.ids)
        if last.role is Role.USER:
            return (*turns, Turn(Role.ASSISTANT, self.text, ids, ending, usage, self.reasoning))
        wrote = self.text or self.reasoning
        more = replace(
            last,
            content=last.content + self.text,
            token_ids=(*last.token_ids, *ids) if last.token_ids and (ids or not wrote) else (),
            ending=ending,
            usage=usage,
            reasoning=last.reasoning + self.reasoning,
        )
        return (*before, more)


class CallBlocks:
    """Shows the tool calls of one reply as blocks of code in its text. The chat runs no tools."""

    def __init__(self) -> None:
        self._has_text = False
        self._open = False

    def shown(self, event: TokenEvent) -> TokenEvent:
        """Return the event with its calls as Markdown in its text."""
        was_open = self._open
        self._has_text = self._has_text or bool(event.text)
        calls = "".join(map(self._call, event.calls))
        # The text of an event may be before its calls, or after those that it ends.
        text = f"{calls}{self._end()}\n\n{event.text}" if was_open and event.text else event.text + calls
        if event.finish_reason is not None:
            text += self._end()
        return msgspec.structs.replace(event, text=text) if text != event.text else event

    def _call(self, call: CallDelta) -> str:
        if not call.name:
            return call.arguments
        before = f"{self._end()}\n\n" if self._has_text or self._open else ""
        self._open = self._has_text = True
        return f"{before}```tool_call\n{call.name} {call.arguments}"

    def _end(self) -> str:
        was_open, self._open = self._open, False
        return "\n```" if was_open else ""
