"""Separates the tool calls in a reply from its text, while the reply arrives in pieces."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from dsmoe_local.engine.reasoning import overlap
from dsmoe_local.engine.tools.calls import CallDelta, Tools, is_text
from dsmoe_local.engine.tools.formats import BARE, HERMES, ToolFormat

_MORE = -1  # the text is too short to decide whether it begins with a literal


class Found(NamedTuple):
    """Text of a reply outside of its calls, and parts of calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class ToolParser:
    """Splits the text of a reply into text and calls.

    Text that may turn out to be a marker, or whitespace next to a call, is held back. A call that is
    malformed before its arguments begin is text. One that is malformed later ends there, and the rest is
    text. Malformed text raises no error.
    """

    def __init__(self, form: ToolFormat, tools: Tools, *, bare: bool = True) -> None:
        """`bare`: a reply that begins as a JSON object with a name and arguments is a call, too."""
        self._own = self._form = form
        self._texts = {
            tool.name: {name for name, schema in tool.properties.items() if is_text(schema)}
            for tool in tools.tools
        }
        # Each state is a method, which returns False if it needs more text.
        self._state: Callable[[], bool] = self._start if bare and form is HERMES else self._free
        self._held = ""
        self._raw = ""  # the text of a call that may still turn out to be malformed, up to _held
        self._trims = False  # whitespace at the beginning of the next text
        self._name = ""
        self._index = -1
        self._n_arguments = 0
        self._scanner = _JsonScanner()
        self._out: list[str] = []
        self._calls: list[CallDelta] = []

    @property
    def holds(self) -> bool:
        """True if text is held back, or the reply is within a call."""
        return bool(self._held) or self._state not in (self._start, self._free)

    def feed(self, piece: str) -> Found:
        """Add text. Return what is certain now."""
        self._held += piece
        while self._state():
            pass
        return self._take()

    def finish(self) -> Found:
        """End the reply. Return what was held back, except for a part of a marker within a call."""
        held, self._held = self._held, ""
        if self._state == self._text:
            self._add(_escaped(held))
        elif self._state == self._value:
            self._add(held)
        elif self._state in (self._start, self._free, self._head):
            self._write(self._raw + held)
        return self._take()

    def _take(self) -> Found:
        found = Found("".join(self._out), tuple(self._calls))
        self._out.clear()
        self._calls.clear()
        return found

    def _write(self, text: str) -> None:
        if text:
            self._out.append(text)
            self._trims = False

    def _add(self, arguments: str) -> None:
        if arguments:
            self._calls.append(CallDelta(self._index, arguments))

    # States outside of calls.

    def _start(self) -> bool:
        """Decide whether the reply is a call without markers."""
        self._form = BARE
        name = self._next_name()
        if name is None:
            return False
        self._state = self._head if name else self._free
        return True

    def _free(self) -> bool:
        self._form = self._own
        if self._trims:
            self._held = self._held.lstrip()
        before, found, after = self._held.partition(self._form.begin)
        if found:
            text = before.rstrip()
            self._write(text)
            self._raw = before[len(text) :] + found
            self._held, self._state = after, self._head
            return True
        certain = before[: len(before) - overlap(before, self._form.begin)].rstrip()
        self._write(certain)
        self._held = before[len(certain) :]
        return False

    def _give_up(self) -> bool:
        """Treat the rest of a malformed call as text."""
        self._write(self._raw)
        self._raw = ""
        self._state = self._free
        return True

    # States within a call. The text before the state's own part is in `_held` no more.

    def _next_name(self) -> str | None:
        """Return the tool whose call begins; "" if none does, None if more text is needed."""
        form = self._form
        follows = (form.key, form.end + form.finish) if form.key else ("{",)
        undecided = False
        for name in self._texts:
            for follow in follows:
                length = _match(self._held, self._head_of(name) + follow)
                if length is not None and length != _MORE:
                    return name
                undecided = undecided or length == _MORE
        return None if undecided else ""

    def _head_of(self, name: str) -> str:
        return self._form.before_name + name + self._form.after_name

    def _head(self) -> bool:
        name = self._next_name()
        if name is None:
            return False
        if not name:
            return self._give_up()
        self._skip(self._head_of(name))
        self._raw, self._name, self._n_arguments = "", name, 0
        self._index += 1
        self._calls.append(CallDelta(self._index, "", f"call_{secrets.token_hex(12)}", name))
        self._scanner = _JsonScanner()
        self._state = self._key if self._form.key else self._json
        return True

    def _json(self) -> bool:
        self._held = self._held if self._scanner.began else self._held.lstrip()
        length = self._scanner.feed(self._held)
        self._add(self._held[:length])
        self._held = self._held[length:]
        if self._scanner.ended:
            self._state = self._end
        return self._scanner.ended

    def _key(self) -> bool:
        """Decide whether another argument follows."""
        form = self._form
        length = _match(self._held, form.key)
        last = _match(self._held, form.end + form.finish)
        if length is not None and length != _MORE:
            self._held, self._state = self._held[length:], self._argument
            return True
        if _MORE in (length, last):
            return False
        self._add("}" if self._n_arguments else "{}")
        self._state = self._end
        return True

    def _argument(self) -> bool:
        """Read the name of an argument, and what is before its value."""
        form = self._form
        place = self._held.find(form.value.split()[0])
        length = _MORE if place < 0 else _match(self._held[place:], form.value)
        if length is None:
            self._add("}" if self._n_arguments else "{}")
            return self._give_up()
        rest = self._held[place + length :]
        if length == _MORE or (form.value.endswith("\n") and not rest):
            return False
        name = self._held[:place].strip()
        self._held = rest.removeprefix("\n") if form.value.endswith("\n") else rest
        self._add(f"{', ' if self._n_arguments else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        self._n_arguments += 1
        is_string = name in self._texts[self._name]
        self._add('"' if is_string else "")
        self._state = self._text if is_string else self._value
        return True

    def _text(self) -> bool:
        """Pass on the value of a string."""
        form = self._form
        marker = form.after_value.strip()
        before, found, after = self._held.partition(marker)
        if found:
            self._add(f'{_escaped(self._value_of(before))}"')
            self._held, self._state = after, self._key
            return True
        n_held = max(overlap(before, marker), overlap(before, form.after_value))
        certain = before[: len(before) - n_held]
        self._add(_escaped(certain))
        self._held = before[len(certain) :]
        return False

    def _value(self) -> bool:
        """Read a whole value that is not a string."""
        before, found, after = self._held.partition(self._form.after_value.strip())
        if not found:
            return False
        self._add(_as_json(self._value_of(before)))
        self._held, self._state = after, self._key
        return True

    def _value_of(self, text: str) -> str:
        """Return a value without the line break that the format writes after it."""
        return text.removesuffix("\n") if self._form.after_value.startswith("\n") else text

    def _end(self) -> bool:
        length = _match(self._held, self._form.end)
        if length == _MORE:
            return False
        if length is None:
            return self._give_up()
        self._held, self._state = self._held[length:], self._after
        self._trims = True
        return True

    def _after(self) -> bool:
        """Decide whether the section ends or another call follows."""
        length = _match(self._held, self._form.finish)
        name = self._next_name() if self._form.finish else ""
        if name:
            self._state = self._head
            return True
        if length == _MORE or name is None:
            return False
        self._held = self._held[length or 0 :]
        self._state = self._free
        return True

    def _skip(self, literal: str) -> None:
        self._held = self._held[_match(self._held, literal) or 0 :]


class _JsonScanner:
    """Finds the end of a JSON object in a text that arrives in pieces, without checking it."""

    def __init__(self) -> None:
        self.began = False
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Return the number of characters that belong to the object."""
        for place, char in enumerate(text):
            self.began = True
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            else:
                self._depth += (char in "{[") - (char in "}]")
                if self._depth <= 0:
                    self.ended = True
                    return place + 1
        return len(text)


def _match(text: str, literal: str) -> int | None:
    """Return how long the beginning of `text` is that matches `literal` apart from whitespace.

    Returns _MORE if `text` is too short, and None if it differs.
    """
    place = 0
    for char in "".join(literal.split()):
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text):
            return _MORE
        if text[place] != char:
            return None
        place += 1
    return place


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(text: str) -> str:
    """Return a value as JSON; as a string if it is not JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = text
    return json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
