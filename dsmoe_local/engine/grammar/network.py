"""A grammar as one small automaton per rule, over bytes, with edges that call other rules.

Built from nodes here, once per grammar; run over text by `matcher`. Within a rule it is deterministic; its
states are made when they are first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.grammar.nodes import Characters, Choice, Grammar, Node, Repeat, Rule, Sequence, Text
from dsmoe_local.engine.grammar.utf8 import byte_ranges

MAX_PARTS = 100_000
"""States in all rules together, at some 300 bytes each."""
MAX_STATES = 1_000_000
"""In deterministic states, states that they stand for, at some 60 bytes each: the most that are kept of a
grammar, and the most that one text may need.
"""
_INLINE_COPIES = 8  # what is repeated more often becomes a rule, so that each copy costs one state


@dataclass(slots=True)
class _Part:
    """A state of a rule before it is made deterministic."""

    empty: list[int] = field(default_factory=list)
    bytes: list[tuple[int, int, int]] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)


class State:
    """A deterministic state of a rule: `final` if the rule may end here, `ends_only` if it must."""

    __slots__ = (
        "_bytes", "_calls", "_first", "_parts", "_rule", "_steps",
        "ends_only", "final", "has_bytes", "key", "size",
    )  # fmt: skip

    def __init__(self, rule: CompiledRule, parts: frozenset[int]) -> None:
        self._rule = rule
        self._parts = parts
        self.key = hash((rule, parts))  # outlives the state: the same one has it when it is made again
        self.size = len(parts)
        self._bytes = tuple(edge for part in sorted(parts) for edge in rule.parts[part].bytes)
        self._steps: dict[int, State | None] = {}
        self._calls: tuple[tuple[CompiledRule, State], ...] | None = None
        self._first: npt.NDArray[np.bool_] | None = None
        self.has_bytes = bool(self._bytes)
        self.final = rule.end in parts
        self.ends_only = (
            self.final and not self.has_bytes and not any(rule.parts[part].calls for part in parts)
        )

    @property
    def calls(self) -> tuple[tuple[CompiledRule, State], ...]:
        """The rules that may begin here, each with the state behind it."""
        if self._calls is None:
            self._calls = self._rule.calls(self._parts)
        return self._calls

    def step(self, byte: int) -> State | None:
        """Where a byte leads within the rule."""
        try:
            return self._steps[byte]
        except KeyError:
            targets = [target for low, high, target in self._bytes if low <= byte <= high]
            self._steps[byte] = found = self._rule.state(targets) if targets else None
            return found

    @property
    def first(self) -> npt.NDArray[np.bool_]:
        """Which bytes lead somewhere within the rule, shape (256,)."""
        if self._first is None:
            self._first = np.zeros(256, np.bool_)
            for low, high, _ in self._bytes:
                self._first[low : high + 1] = True
        return self._first

    def forget(self) -> None:
        """Let go of the states that are reached from here."""
        self._steps = {}
        self._calls = None


class _Kept:
    """The deterministic states of a grammar's rules, shared by all texts that are held to it.

    When they are too many all are dropped. Those in use stay usable; the others are made again when needed.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[CompiledRule, frozenset[int]], State] = {}
        self._size = 0

    def state(self, rule: CompiledRule, parts: frozenset[int]) -> State:
        """The state for these parts of a rule."""
        known = self._states.get((rule, parts))
        if known is None:
            if self._size + len(parts) > MAX_STATES:
                self._drop()
            self._size += len(parts)
            known = self._states[rule, parts] = State(rule, parts)
        return known

    def _drop(self) -> None:
        for state in list(self._states.values()):
            state.forget()
        self._states = {}
        self._size = 0


def check_size(size: int) -> None:
    """EngineError if a text needs states of that size together."""
    if size > MAX_STATES:
        raise EngineError(
            "the grammar needs too many states",
            remedy="do not put long repetitions of the same side by side",
        )


class CompiledRule:
    """One rule. `nullable`: nothing at all is one of its texts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: list[_Part] = []
        self.end = -1
        self.nullable = False
        self._rules: list[CompiledRule] = []
        self._kept: _Kept
        self.start: State

    def link(self, rules: list[CompiledRule], kept: _Kept) -> None:
        """Make the rule ready to run; `rules` are those that the parts call by index."""
        self._rules = rules
        self._kept = kept
        self.start = self.state([0])

    def state(self, targets: Iterable[int]) -> State:
        """The state for being at any of these parts."""
        return self._kept.state(self, self._closed(targets))

    def calls(self, parts: frozenset[int]) -> tuple[tuple[CompiledRule, State], ...]:
        """The rules that may begin at these parts, each with the state behind it. EngineError: too many."""
        behind: dict[int, list[int]] = {}
        for part in parts:
            for index, target in self.parts[part].calls:
                behind.setdefault(index, []).append(target)
        calls: list[tuple[CompiledRule, State]] = []
        size = 0
        for index, targets in behind.items():
            after = self.state(targets)
            calls.append((self._rules[index], after))
            size += after.size
            check_size(size)
        return tuple(calls)

    def _closed(self, targets: Iterable[int]) -> frozenset[int]:
        todo, seen = list(targets), set(targets)
        while todo:
            for target in self.parts[todo.pop()].empty:
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return frozenset(seen)


def compile_grammar(grammar: Grammar) -> CompiledRule:
    """The root rule, ready to run, without the branches that could never end.

    Raises UsageError for a rule that is missing, a grammar too large, or one that no text can satisfy.
    """
    builder = _Builder(grammar)
    rules = builder.build()
    root = rules[builder.index[grammar.root]]
    endings = _Endings(rules, bytes_too=True)
    if builder.index[grammar.root] not in endings.rules:
        raise UsageError("no text can satisfy the grammar", where=f"rule {grammar.root}")
    for rule, alive in zip(rules, endings.alive, strict=True):
        _prune(rule, alive, endings.rules)
    for number in _Endings(rules, bytes_too=False).rules:
        rules[number].nullable = True
    kept = _Kept()
    for rule in rules:
        rule.link(rules, kept)
    return root


class _Builder:
    """Parts from nodes, rule by rule."""

    def __init__(self, grammar: Grammar) -> None:
        self._nodes = dict(grammar.rules)
        self.index = {name: number for number, name in enumerate(self._nodes)}
        self._hoisted: dict[Node, str] = {}
        self._count = 0

    def build(self) -> list[CompiledRule]:
        """All rules, in the order of `index`, which grows by what is hoisted on the way."""
        rules: list[CompiledRule] = []
        names = list(self._nodes)
        while len(rules) < len(names):
            rule = CompiledRule(names[len(rules)])
            start, rule.end = self._part(rule), self._part(rule)
            self._add(rule, self._nodes[rule.name], start, rule.end)
            rules.append(rule)
            names = list(self._nodes)
        return rules

    def _part(self, rule: CompiledRule) -> int:
        self._count += 1
        if self._count > MAX_PARTS:
            raise UsageError("the grammar is too large", remedy="use smaller repetitions and fewer rules")
        rule.parts.append(_Part())
        return len(rule.parts) - 1

    def _add(self, rule: CompiledRule, node: Node, start: int, end: int) -> None:
        """Ways from `start` to `end` for each text of the node."""
        _ADD[type(node)](self, rule, node, start, end)

    def _add_characters(self, rule: CompiledRule, node: Characters, start: int, end: int) -> None:
        for low, high in node.ranges:
            for sequence in byte_ranges(low, high):
                self._add_bytes(rule, sequence, start, end)

    def _add_text(self, rule: CompiledRule, node: Text, start: int, end: int) -> None:
        self._add_bytes(rule, [(byte, byte) for byte in node.text.encode()], start, end)

    def _add_bytes(self, rule: CompiledRule, ranges: Iterable[tuple[int, int]], start: int, end: int) -> None:
        steps = list(ranges)
        if not steps:
            rule.parts[start].empty.append(end)
        for number, (low, high) in enumerate(steps):
            target = end if number == len(steps) - 1 else self._part(rule)
            rule.parts[start].bytes.append((low, high, target))
            start = target

    def _add_sequence(self, rule: CompiledRule, node: Sequence, start: int, end: int) -> None:
        for item in node.items:
            after = self._part(rule)
            self._add(rule, item, start, after)
            start = after
        rule.parts[start].empty.append(end)

    def _add_choice(self, rule: CompiledRule, node: Choice, start: int, end: int) -> None:
        for item in node.items:
            # Apart, so that a loop within one item does not lead into another.
            first = self._part(rule)
            rule.parts[start].empty.append(first)
            self._add(rule, item, first, end)

    def _add_repeat(self, rule: CompiledRule, node: Repeat, start: int, end: int) -> None:
        copies = node.low if node.high is None else node.high
        item = node.item
        if copies > _INLINE_COPIES and not isinstance(item, Rule):
            item = self._hoist(item)
        for number in range(copies):
            after = self._part(rule)
            self._add(rule, item, start, after)
            if number >= node.low:
                rule.parts[start].empty.append(end)
            start = after
        if node.high is None:
            loop, after = self._part(rule), self._part(rule)
            rule.parts[start].empty.append(loop)
            self._add(rule, item, loop, after)
            rule.parts[after].empty.append(loop)
            start = loop
        rule.parts[start].empty.append(end)

    def _add_rule(self, rule: CompiledRule, node: Rule, start: int, end: int) -> None:
        if node.name not in self.index:
            raise UsageError(f"the grammar has no rule {node.name}", where=f"rule {rule.name}")
        rule.parts[start].calls.append((self.index[node.name], end))

    def _hoist(self, node: Node) -> Rule:
        name = self._hoisted.get(node)
        if name is None:
            name = self._hoisted[node] = f"repeated {len(self._hoisted)}"  # no name that a grammar can have
            self.index[name] = len(self._nodes)
            self._nodes[name] = node
        return Rule(name)


_ADD: dict[type, Callable[..., None]] = {
    Characters: _Builder._add_characters,
    Text: _Builder._add_text,
    Sequence: _Builder._add_sequence,
    Choice: _Builder._add_choice,
    Repeat: _Builder._add_repeat,
    Rule: _Builder._add_rule,
}


class _Endings:
    """From which parts the end of their rule is reached: over anything, or (`bytes_too` False) over nothing.

    Backwards from the rules' ends; a call counts once the rule called is known to come to an end itself.
    """

    def __init__(self, rules: list[CompiledRule], *, bytes_too: bool) -> None:
        self.alive = [{rule.end} for rule in rules]
        self.rules: set[int] = set()
        self._waiting: dict[int, list[tuple[int, int]]] = {}
        self._todo = [(number, rule.end) for number, rule in enumerate(rules)]
        back = [_edges_back(rule, bytes_too=bytes_too) for rule in rules]
        while self._todo:
            number, part = self._todo.pop()
            for source, called in back[number].get(part, ()):
                if called is None or called in self.rules:
                    self._reach(number, source)
                else:
                    self._waiting.setdefault(called, []).append((number, source))
            if part == 0:
                self.rules.add(number)
                for waiting in self._waiting.pop(number, ()):
                    self._reach(*waiting)

    def _reach(self, number: int, part: int) -> None:
        if part not in self.alive[number]:
            self.alive[number].add(part)
            self._todo.append((number, part))


def _edges_back(rule: CompiledRule, *, bytes_too: bool) -> dict[int, list[tuple[int, int | None]]]:
    """For each part the edges that lead to it: their source, and the rule called on the way."""
    back: dict[int, list[tuple[int, int | None]]] = {}
    for source, part in enumerate(rule.parts):
        edges: list[tuple[int, int | None]] = [(target, None) for target in part.empty]
        edges += [(target, called) for called, target in part.calls]
        if bytes_too:
            edges += [(target, None) for _, _, target in part.bytes]
        for target, called in edges:
            back.setdefault(target, []).append((source, called))
    return back


def _prune(rule: CompiledRule, alive: set[int], productive: set[int]) -> None:
    """Drop the edges behind which the rule cannot end: whoever takes one would never come to an end."""
    for part in rule.parts:
        part.empty = [target for target in part.empty if target in alive]
        part.bytes = [edge for edge in part.bytes if edge[2] in alive]
        part.calls = [(called, t) for called, t in part.calls if called in productive and t in alive]
