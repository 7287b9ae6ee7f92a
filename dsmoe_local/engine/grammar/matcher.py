"""Running a compiled grammar over bytes: how a text may go on. Polynomial for every grammar.

All ways to read the text are followed at once. Those that are inside the same rule since the same place share
one frame, so their number is bounded by the text's length, not exponential in it; left recursion and endless
ambiguity end here like anything else. A call at a rule's very end hands on its own caller, so that lists
written by right recursion do not pile up frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.grammar.network import CompiledRule, State, check_size

MAX_WAYS = 5_000
"""Ways to read a text that are followed at once; a grammar that is not ambiguous needs a few dozen."""


class Frame:
    """A rule being read since some place in the text, and where to go on behind it."""

    __slots__ = ("returns",)

    def __init__(self) -> None:
        self.returns: dict[Way, None] = {}


Way: TypeAlias = tuple[State, Frame]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a text: the ways it may go on, and whether it may end here."""

    ways: tuple[Way, ...]
    complete: bool

    def first_bytes(self) -> npt.NDArray[np.bool_]:
        """Which bytes may follow, shape (256,)."""
        allowed = np.zeros(256, np.bool_)
        for state, _ in self.ways:
            allowed |= state.first
        return allowed


class Matcher:
    """Positions in texts of one grammar. They are values: advancing one leaves it as it was."""

    def __init__(self, root: CompiledRule) -> None:
        self._root = root
        self._outermost = Frame()
        self._needs = _Needs()
        self.work = 0  # ways taken so far, for whoever has to stop in time

    def start(self) -> Position:
        """Before the first byte."""
        closure = _Closure(self._outermost, self._needs)
        closure.add(self._root.start, self._outermost)
        return closure.finish()

    def advance(self, position: Position, text: bytes) -> Position | None:
        """Behind `text`; None if the grammar does not permit it here. EngineError: too many ways, states."""
        for byte in text:
            closure = _Closure(self._outermost, self._needs)
            for state, frame in position.ways:
                target = state.step(byte)
                if target is not None:
                    closure.add(target, frame)
            position = closure.finish()
            self.work += closure.work
            if not position.ways and not position.complete:
                return None
        return position


class _Needs:
    """The size of the states that one matcher has come to. It does not matter who had them made."""

    def __init__(self) -> None:
        self._keys: set[int] = set()
        self._size = 0

    def add(self, state: State) -> None:
        """A state; one already known is not counted twice."""
        if state.key not in self._keys:
            self._keys.add(state.key)
            self._size += state.size
            check_size(self._size)


class _Closure:
    """The ways at one place: those given, and all that begin or return without a byte between."""

    def __init__(self, outermost: Frame, needs: _Needs) -> None:
        self._outermost = outermost
        self._needs = needs
        self._todo: list[Way] = []
        self._seen: set[Way] = set()
        self._frames: dict[CompiledRule, Frame] = {}
        self._new: set[Frame] = set()
        self.work = 0

    def add(self, state: State, frame: Frame) -> None:
        """A way; ways already known are not taken twice."""
        self.work += 1
        if self.work > MAX_WAYS:
            raise EngineError(
                "the grammar can be read in too many ways at once",
                remedy="write it without ambiguity, above all in repetitions of repetitions",
            )
        way = (state, frame)
        if way not in self._seen:
            self._needs.add(state)
            self._seen.add(way)
            self._todo.append(way)

    def finish(self) -> Position:
        """The position, all ways followed."""
        ways: list[Way] = []
        complete = False
        while self._todo:
            state, frame = self._todo.pop()
            if state.has_bytes:
                ways.append((state, frame))
            for rule, after in state.calls:
                self._call(rule, after, frame)
            if state.final:
                complete = complete or frame is self._outermost
                for back, parent in frame.returns:
                    self.add(back, parent)
        return Position(tuple(ways), complete)

    def _call(self, rule: CompiledRule, after: State, frame: Frame) -> None:
        self._needs.add(after)
        callee = self._frames.get(rule)
        if callee is None:
            callee = self._frames[rule] = Frame()
            self._new.add(callee)
            self.add(rule.start, callee)
        # A frame that begins here may still get callers; only those of older frames are all known.
        if after.ends_only and frame is not self._outermost and frame not in self._new:
            self.work += len(frame.returns)
            callee.returns.update(frame.returns)
        else:
            callee.returns[after, frame] = None
        if rule.nullable:
            self.add(after, frame)
