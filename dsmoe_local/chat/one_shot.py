"""Answer one prompt. Only the answer goes to the output stream; notes go to stderr."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Mapping
from typing import TextIO

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.base.signals import handling
from dsmoe_local.base.text import safe_text
from dsmoe_local.chat import notices
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.conversation import Asked, Conversation
from dsmoe_local.chat.settings import Think
from dsmoe_local.chat.terminal.screen import is_dumb
from dsmoe_local.engine.types import FinishReason

_CUT: Mapping[FinishReason | None, tuple[str, str]] = {
    FinishReason.LENGTH: ("the reply was cut at the token limit", "-n N allows more tokens"),
    FinishReason.CONTEXT_FULL: ("the context is full: the reply ends there", "-c N makes it larger"),
}


def answer(
    conversation: Conversation,
    text: str,
    out: TextIO,
    *,
    notes: TextIO | None = None,
    as_json: bool = False,
    stats: bool = False,
) -> None:
    """Write the reply to `text` as it is generated, or with `as_json` as one JSON object at the end.

    The object has the fields `text`, `finish_reason`, `usage` and `model`; `reasoning_content` if there is
    reasoning; and with a JSON schema `value`: the parsed text, or null if it was cut.

    Reasoning is shown dimmed on a terminal, unless the setting `think` hides it. It is not written to any
    other output. Leading whitespace belongs to the chat template and is left out, except in a completion. A
    terminal gets control characters made visible and JSON indented; any other output gets the exact text.
    Notes and `stats` go to `notes` (None: stderr).

    Ctrl-C stops the reply: its text so far is written, and InterruptedRunError is raised. A second Ctrl-C
    raises KeyboardInterrupt at once. DsmoeError if a reply for a JSON schema was cut before it was valid.
    """
    notes = notes if notes is not None else sys.stderr
    shows = conversation.settings.think is Think.SHOW
    is_json = conversation.json_schema is not None
    if tools := notices.about_tools(conversation):
        _note(notes, tools)
    written = _Output(out, silent=as_json, is_json=is_json, shows_reasoning=shows)
    try:
        with handling({signal.SIGINT: _CancelOnce(conversation)}):
            for event in conversation.send(text):
                if isinstance(event, MadeRoom):
                    _note(notes, notices.made_room(event))
                elif not isinstance(event, Asked):
                    written.add_reasoning(event.reasoning)
                    written.add(event.text, trim=not conversation.completes)
    except BaseException:
        written.break_off()
        raise
    value = _json_value(written.text) if conversation.json_schema is not None else None
    if as_json:
        written.write(_envelope(conversation, written, value))
    written.finish()
    if stats and conversation.usage is not None:
        notes.write(notices.usage(conversation.usage) + "\n")
    if written.reasoning and not written.text:
        _note(notes, "the reply has no answer: it ended while the model was still reasoning")
    _report_ending(conversation, notes, invalid_json=conversation.json_schema is not None and value is None)


class _Output:
    """Writes a reply to a stream and collects its text."""

    def __init__(self, out: TextIO, *, silent: bool, is_json: bool, shows_reasoning: bool) -> None:
        self.text = ""
        self.reasoning = ""
        self._last = ""
        self._out = out
        self._silent = silent
        self._shows_reasoning = shows_reasoning and not silent and out.isatty() and not is_dumb()
        self._make_safe = safe_text if out.isatty() else str
        self._format = IndentedJson().feed if is_json and out.isatty() else str

    def add(self, piece: str, *, trim: bool) -> None:
        piece = piece.lstrip() if trim and not self.text else piece
        if not piece:
            return
        if self._shows_reasoning and self.reasoning and not self.text:
            self._out.write("\n\n")
        self.text += piece
        if not self._silent:
            self.write(self._format(piece))
            self._out.flush()

    def add_reasoning(self, piece: str) -> None:
        self.reasoning += piece
        if piece and self._shows_reasoning:
            self._out.write(f"\x1b[2m{safe_text(piece)}\x1b[0m")
            self._out.flush()

    def finish(self) -> None:
        """End the last line. Hidden reasoning without an answer has no line."""
        if self._last != "\n" and (self._last or not self.reasoning or self._shows_reasoning):
            self._out.write("\n")
        self._out.flush()

    def write(self, text: str) -> None:
        """Write `text`, made safe for a terminal."""
        self._out.write(self._make_safe(text))
        self._last = text[-1:] or self._last

    def break_off(self) -> None:
        """End the line on a terminal, so that an error message begins a new one."""
        if self.text and not self._silent and self._out.isatty():
            self.finish()


class _CancelOnce:
    """Handles SIGINT: the first Ctrl-C cancels the reply, the second one raises KeyboardInterrupt."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._cancelled = False

    def __call__(self, number: int) -> None:
        if self._cancelled:
            raise KeyboardInterrupt
        self._cancelled = True
        self._conversation.cancel()


def _json_value(text: str) -> str | None:
    """Return `text` as JSON on one line, with its numbers unchanged; None if it is not valid JSON."""
    try:
        json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    # JSON strings contain no newlines, so these are all between tokens.
    return text.replace("\n", " ").strip()


def _envelope(conversation: Conversation, written: _Output, value: str | None) -> str:
    usage = conversation.usage
    reasoning = {"reasoning_content": written.reasoning} if written.reasoning else {}
    fields = {
        "text": written.text,
        **reasoning,
        "finish_reason": conversation.finish_reason,
        "usage": None if usage is None else dataclasses.asdict(usage),
        "model": conversation.engine.info.name,
    }
    envelope = json.dumps(fields, ensure_ascii=False)
    if conversation.json_schema is None:
        return envelope
    return f'{envelope.removesuffix("}")}, "value": {value or "null"}}}'


def _report_ending(conversation: Conversation, notes: TextIO, *, invalid_json: bool) -> None:
    """Report how the reply ended, unless the model ended it. See `answer` for the errors."""
    ending = conversation.finish_reason
    if ending is FinishReason.CANCELLED:
        raise InterruptedRunError("interrupted", signal_number=signal.SIGINT)
    what, remedy = _CUT.get(ending, ("a stop string ended the reply", ""))
    info = conversation.engine.info
    if ending is FinishReason.CONTEXT_FULL and info.n_context >= info.n_context_trained:
        remedy = "the model was trained for no more"
    if invalid_json:
        raise DsmoeError("the reply ended before it was valid JSON", where=what, remedy=remedy)
    if ending in _CUT:
        _note(notes, f"{what}: {remedy}")


def _note(notes: TextIO, text: str) -> None:
    notes.write(f"note: {text}\n")
    notes.flush()


_JSON_INDENT = "  "
_OPENS, _CLOSES = "{[", "}]"
_SPACES = " \t\r\n"


class IndentedJson:
    """Indents JSON while it is being generated, with one member or element on a line. Validates nothing."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._after_opening = False  # an empty object or array stays on one line

    def feed(self, piece: str) -> str:
        """Return what `piece` adds to the output."""
        return "".join(map(self._indent, piece))

    def _indent(self, character: str) -> str:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
            return character
        if character in _SPACES:
            return ""
        empty, self._after_opening = self._after_opening, False
        if character in _CLOSES:
            self._depth = max(0, self._depth - 1)
            return character if empty else self._line() + character
        before = self._line() if empty else ""
        if character in _OPENS:
            self._depth += 1
            self._after_opening = True
        self._in_string = character == '"'
        after = {",": self._line(), ":": " "}.get(character, "")
        return before + character + after

    def _line(self) -> str:
        return "\n" + _JSON_INDENT * self._depth
