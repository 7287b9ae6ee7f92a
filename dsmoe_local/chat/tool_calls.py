"""Shows tool calls in the text of a reply, as blocks of code. The chat runs no tools."""

from __future__ import annotations

import msgspec

from dsmoe_local.engine.types import CallDelta, TokenEvent


class CallBlocks:
    """The blocks of one reply."""

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
