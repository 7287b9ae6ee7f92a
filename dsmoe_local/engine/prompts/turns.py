"""Continues the rendering of a shorter conversation with more messages.

A template loops over the messages. Suppose that at the start of an iteration the template has read nothing
that depends on the number of messages that follow. Then the output so far is the same for every longer
conversation, and its rendering can continue there, if all variables that the template can read are the same
too. `sandbox` marks the loops, which call `Run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace, missing

_WHOLE = 1 << 62
Values: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages as dictionaries with the keys of OpenAI's messages."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The namespaces and variables before a loop, which the rest of the template can read."""

    spaces: tuple[str, ...]
    variables: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point where a rendering can continue with more messages: the start of an iteration of a loop.

    `loop` is the number of the loop, `index` the message of the iteration, `position` the length of the
    output before it. `spaces` and `changed` are the state after the earlier iterations: the namespaces, and
    the last value of `loop.changed()`.
    """

    index: int
    position: int
    loop: int
    entry: Entry
    spaces: tuple[dict[str, Any], ...]
    changed: object


@dataclass(frozen=True, slots=True)
class Rendered:
    """The output, or the output after a checkpoint if the rendering continued there.

    `before` is the output before the loop. `checkpoint` is at the last message. It is None if the output may
    already depend on the fact that no message follows.
    """

    text: str
    before: str
    checkpoint: Checkpoint | None


class RefusedError(jinja2.TemplateRuntimeError):
    """The template called raise_exception, its output is too long, or a rendering cannot continue."""


class Run:
    """One rendering: its output, and how much of the number of messages the template has read.

    `n_read` is the largest n for which the template has tested whether there are n messages.
    """

    def __init__(self, messages: Values, after: Checkpoint | None = None) -> None:
        self.items = list(messages)
        self.pieces: list[str] = []
        self.before = ""
        self.n_read = 0
        self.namespaces: list[Namespace] = []
        self.checkpoint: Checkpoint | None = None
        self.resumed = False
        self._after = after
        # State of the current marked loop. Its number is -1 if it does not loop over messages.
        self._loop = -1
        self._walk = _Walk(self, 0)
        self._first = 0
        self._entry: Entry | None = None

    def note_read(self, count: int) -> None:
        """Record that the template has tested whether there are `count` messages."""
        self.n_read = max(self.n_read, count)

    def enter_loop(self, number: int, turns: Turns | None, context: Context) -> _Walk:
        """Begin or continue the marked loop with this number. `turns` is None if it is not over messages."""
        self._loop = number if turns is not None else -1
        self._first = turns.start if turns is not None else 0
        self._walk = _Walk(self, self._after.index if self._resumes and self._after else self._first)
        # After the loop that was continued, the state before a loop is not known.
        self._entry = None if self.resumed else self._state(context)
        if not self.resumed:
            self.before = "".join(self.pieces)
        if self._after is not None and self._resumes and self._entry != self._after.entry:
            raise RefusedError("more messages change the output before the loop")
        self.n_read = 0
        return self._walk

    def _state(self, context: Context) -> Entry | None:
        """Return the state that the template can read; None if it is mutable or cannot be compared."""
        spaces = [_attributes(space) for space in self.namespaces]
        if not all(map(_is_plain, spaces)):
            return None
        variables: list[tuple[str, object]] = []
        for name, value in context.vars.items():
            if isinstance(value, Turns):
                variables.append((name, value.start))
            elif isinstance(value, Namespace):
                variables.append((name, [space is value for space in self.namespaces]))
            elif _is_plain(value):
                variables.append((name, repr(value)))
            elif isinstance(value, Macro):
                variables.append((name, None))
            else:
                return None
        return Entry(tuple(map(repr, spaces)), tuple(variables))

    @property
    def _resumes(self) -> bool:
        """True if the rendering continues in the current loop."""
        return self._after is not None and self._after.loop == self._loop and not self.resumed

    def begin_turn(self, loop: LoopContext | None) -> None:
        """Begin an iteration of a marked loop. Set `checkpoint` if it is the one of the last message."""
        if self._loop < 0:
            return
        if self._after is not None and self._resumes:
            self._resume(self._after, loop)
        index = self._walk.position - 1
        if index < len(self.items) - 1 or self.n_read > len(self.items) or self._entry is None:
            return
        spaces = tuple(dict(_attributes(space)) for space in self.namespaces[: len(self._entry.spaces)])
        changed = missing if loop is None else loop._last_changed_value
        if all(map(_is_plain, (*spaces, () if changed is missing else changed))):
            position = sum(map(len, self.pieces))
            self.checkpoint = Checkpoint(index, position, self._loop, self._entry, spaces, changed)

    def _resume(self, after: Checkpoint, loop: LoopContext | None) -> None:
        self.resumed = True
        self.pieces.clear()
        for space, values in zip(self.namespaces, after.spaces, strict=True):
            _attributes(space).clear()
            _attributes(space).update(values)
        if loop is not None:
            loop.index0 = after.index - self._first
            loop._last_changed_value = after.changed
            if loop.index0 > 0:
                loop._before = self.items[after.index - 1]


class _Walk(Iterator[Any]):
    """An iterator over the messages. `position` is the index of the next one."""

    def __init__(self, run: Run, position: int) -> None:
        self._run = run
        self.position = position

    def __next__(self) -> Any:  # noqa: ANN401 - a message
        self._run.note_read(self.position + 1)
        if self.position >= len(self._run.items):
            raise StopIteration
        self.position += 1
        return self._run.items[self.position - 1]


class Turns(Sequence[Any]):
    """The messages from `start` on, as a sequence that records in its run what the template reads."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, run: Run, start: int) -> None:
        self._run = run
        self.start = start

    def whole(self) -> list[Any]:
        """Return the messages as a list, which reveals their number."""
        self._run.note_read(_WHOLE)
        return self._run.items[self.start :]

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as Sequence's
        if isinstance(index, slice):
            if (index.start or 0) >= 0 and index.stop is None and index.step is None:
                return Turns(self._run, self.start + (index.start or 0))
        elif index >= 0:
            self._run.note_read(self.start + index + 1)
            return self._run.items[self.start + index]
        return self.whole()[index]

    def __iter__(self) -> _Walk:
        return _Walk(self._run, self.start)

    def __len__(self) -> int:
        return len(self.whole())

    def __bool__(self) -> bool:
        self._run.note_read(self.start + 1)
        return len(self._run.items) > self.start

    def __eq__(self, other: object) -> bool:
        return self.whole() == (other.whole() if isinstance(other, Turns) else other)

    def __repr__(self) -> str:
        return repr(self.whole())


_SCALARS = (str, int, float, type(None), jinja2.Undefined)
_MAX_DEPTH = 4


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return True if `value` consists of immutable scalars and containers of them."""
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        return all(_is_plain(item, depth + 1) for item in value)
    return isinstance(value, _SCALARS)


def _attributes(space: Namespace) -> dict[str, Any]:
    attributes: dict[str, Any] = space._Namespace__attrs
    return attributes
