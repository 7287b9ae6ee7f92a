"""What a template sees of a conversation, and how a rendering goes on where one of fewer messages ended.

A template is run as it is; which of its loops are marked is `sandbox`'s concern. A rendering may go on at a
message if no more was known of the conversation there than that this message exists, and if all that the rest
of the template can know is the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace, missing

_WHOLE = 1 << 62
Values: TypeAlias = Sequence[Mapping[str, str]]
"""Messages as templates see them: role and content."""


@dataclass(frozen=True, slots=True)
class Entry:
    """All that a loop, and what comes after it, can know of what came before: namespaces and variables."""

    spaces: tuple[str, ...]
    variables: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a rendering can go on with more messages: at the beginning of the body of a loop over them.

    `index` is the message that the loop has come to, `position` the length of the output before it, and
    `loop` says which one it is. `spaces` and `changed` are what its earlier iterations leave behind.
    """

    index: int
    position: int
    loop: int
    entry: Entry
    spaces: tuple[dict[str, Any], ...]
    changed: object


@dataclass(frozen=True, slots=True)
class Rendered:
    """An output, from the checkpoint on where there was one; and a checkpoint at the last message, None if
    the loop may have acted on there being no more messages. `before` is the output before the loop.
    """

    text: str
    before: str
    checkpoint: Checkpoint | None


class RefusedError(jinja2.TemplateRuntimeError):
    """The template's own raise_exception, an output that is too long, or a rendering that cannot go on."""


class Run:
    """One rendering: what it has written, and how many messages its marked loop knows to be there."""

    def __init__(self, messages: Values, after: Checkpoint | None = None) -> None:
        self.items = list(messages)
        self.pieces: list[str] = []
        self.before = ""
        self.n_known = 0
        self.namespaces: list[Namespace] = []
        self.checkpoint: Checkpoint | None = None
        self.resumed = False
        self._after = after
        # Of the marked loop that runs, if it is one over messages.
        self._loop = -1
        self._walk = _Walk(self, 0)
        self._first = 0
        self._entry: Entry | None = None

    def know(self, count: int) -> None:
        """The template has learned whether there are that many messages."""
        self.n_known = max(self.n_known, count)

    def enter_loop(self, number: int, turns: Turns | None, context: Context) -> _Walk:
        """Begin, or resume, the marked loop of that number. `turns` None: it is not over messages."""
        self._loop = number if turns is not None else -1
        self._first = turns.start if turns is not None else 0
        self._walk = _Walk(self, self._after.index if self._resumes and self._after else self._first)
        # Of another loop than it went on in, what came before is not known.
        self._entry = None if self.resumed else self._state(context)
        if not self.resumed:
            self.before = "".join(self.pieces)
        if self._after is not None and self._resumes and self._entry != self._after.entry:
            raise RefusedError("more messages make a difference before the loop")
        self.n_known = 0
        return self._walk

    def _state(self, context: Context) -> Entry | None:
        """None if it may change, or cannot be compared."""
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
        """Whether the loop that runs is the one to go on with."""
        return self._after is not None and self._after.loop == self._loop and not self.resumed

    def begin_turn(self, loop: LoopContext | None) -> None:
        """An iteration of a marked loop begins."""
        if self._loop < 0:
            return
        if self._after is not None and self._resumes:
            self._resume(self._after, loop)
        index = self._walk.position - 1
        if index < len(self.items) - 1 or self.n_known > len(self.items) or self._entry is None:
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
    """Goes through the messages; `position` is the next one's index."""

    def __init__(self, run: Run, position: int) -> None:
        self._run = run
        self.position = position

    def __next__(self) -> Any:  # noqa: ANN401 - a message
        self._run.know(self.position + 1)
        if self.position >= len(self._run.items):
            raise StopIteration
        self.position += 1
        return self._run.items[self.position - 1]


class Turns(Sequence[Any]):
    """The messages from `start` on. Tells its run what the template learns of them."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, run: Run, start: int) -> None:
        self._run = run
        self.start = start

    def whole(self) -> list[Any]:
        """As a list, whose end the template then may see."""
        self._run.know(_WHOLE)
        return self._run.items[self.start :]

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as Sequence's
        if isinstance(index, slice):
            if (index.start or 0) >= 0 and index.stop is None and index.step is None:
                return Turns(self._run, self.start + (index.start or 0))
        elif index >= 0:
            self._run.know(self.start + index + 1)
            return self._run.items[self.start + index]
        return self.whole()[index]

    def __iter__(self) -> _Walk:
        return _Walk(self._run, self.start)

    def __len__(self) -> int:
        return len(self.whole())

    def __bool__(self) -> bool:
        self._run.know(self.start + 1)
        return len(self._run.items) > self.start

    def __eq__(self, other: object) -> bool:
        return self.whole() == (other.whole() if isinstance(other, Turns) else other)

    def __repr__(self) -> str:
        return repr(self.whole())


_SCALARS = (str, int, float, type(None), jinja2.Undefined)
_DEEPEST = 4


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether nothing that a template does can change `value`, and it knows of no run."""
    if isinstance(value, dict) and depth < _DEEPEST:
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return all(_is_plain(item, depth + 1) for item in value)
    return isinstance(value, _SCALARS)


def _attributes(space: Namespace) -> dict[str, Any]:
    attributes: dict[str, Any] = space._Namespace__attrs
    return attributes
