"""Converts a grammar to llguidance's dialect of Lark.

llguidance's lexer splits a text into the longest possible lexemes for its Earley parser. GBNF has no lexemes.
So a grammar without recursion becomes a single lexeme, a regular expression. In a grammar with recursion,
every lexeme is a single character. Both accept exactly the texts of the GBNF grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.grammar.nodes import Characters, Choice, Grammar, Node, Repeat, Rule, Sequence, Text

MAX_RULES = 10_000
"""llguidance recurses over rules. The stack of `large_stack` is sufficient for this many."""


def to_lark(grammar: Grammar) -> str:
    """Return the grammar as Lark.

    Raises UsageError if a rule is missing, if there are too many rules, or if no text matches.
    """
    uses = {name: frozenset(_rules_of(node)) for name, node in grammar.rules.items()}
    for name, used in uses.items():
        if lost := used - grammar.rules.keys():
            raise UsageError(f"the grammar has no rule {min(lost)}", where=f"rule {name}", remedy="define it")
    productive = _productive(grammar, uses)
    if grammar.root not in productive:
        raise UsageError(
            "no text matches the grammar",
            where=f"rule {grammar.root}",
            remedy="add an alternative that does not refer to the rule itself",
        )
    rules: dict[str, Node] = {}
    for name in productive:
        node = _prune(grammar.rules[name], productive)
        assert node is not None
        rules[name] = _without_tail_call(node, name)
    needed = _reachable(rules, grammar.root)
    recursive = _is_recursive({name: _rules_of(rules[name]) for name in needed})
    return _Writer(rules, needed, "r" if recursive else "R").text(grammar.root)


def _rules_of(node: Node) -> Iterator[str]:
    if isinstance(node, Rule):
        yield node.name
    elif isinstance(node, Repeat):
        yield from _rules_of(node.item)
    elif isinstance(node, Sequence | Choice):
        for item in node.items:
            yield from _rules_of(item)


def _productive(grammar: Grammar, uses: dict[str, frozenset[str]]) -> set[str]:
    """Return the rules that match at least one text. With the others, llguidance could reach a dead end."""
    users: dict[str, list[str]] = {name: [] for name in uses}
    for name, used in uses.items():
        for other in used:
            users[other].append(name)
    productive: set[str] = set()
    todo = list(uses)
    while todo:
        name = todo.pop()
        if name not in productive and _prune(grammar.rules[name], productive) is not None:
            productive.add(name)
            todo += users[name]
    return productive


def _prune(node: Node, productive: set[str]) -> Node | None:
    """Return the node without alternatives that match no text; None if nothing is left."""
    if isinstance(node, Rule):
        return node if node.name in productive else None
    if isinstance(node, Characters):
        return node if node.ranges else None
    if isinstance(node, Repeat):
        item = _prune(node.item, productive)
        if item is None:
            return Sequence(()) if node.low == 0 else None
        return Repeat(item, node.low, node.high)
    if isinstance(node, Sequence | Choice):
        kept = [_prune(item, productive) for item in node.items]
        found = tuple(item for item in kept if item is not None)
        if isinstance(node, Choice):
            return Choice(found) if found else None
        return Sequence(found) if len(found) == len(kept) else None
    return node


def _without_tail_call(node: Node, name: str) -> Node:
    """Return the rule `name` with its right recursion as a loop: `a ::= x a | y` becomes `x* y`.

    Other rules are returned unchanged. Without Leo's optimization, an Earley parser keeps an item for each
    level of right recursion.
    """
    ways = node.items if isinstance(node, Choice) else (node,)
    again: list[Node] = []
    last: list[Node] = []
    for way in ways:
        head, end = (way.items[:-1], way.items[-1]) if isinstance(way, Sequence) and way.items else ((), way)
        if end in (Rule(name), Repeat(Rule(name), 0, 1)):
            again.append(Sequence(head))
        if end != Rule(name):
            last.append(Sequence(head) if isinstance(end, Repeat) and end.item == Rule(name) else way)
    looped = Sequence((Repeat(Choice(tuple(again)), 0, None), Choice(tuple(last))))
    return looped if again and name not in _rules_of(looped) else node


def _reachable(rules: dict[str, Node], root: str) -> list[str]:
    found = {root: None}
    todo = [root]
    while todo:
        for name in _rules_of(rules[todo.pop()]):
            if name not in found:
                found[name] = None
                todo.append(name)
    return list(found)


def _is_recursive(uses: dict[str, Iterator[str]]) -> bool:
    try:
        TopologicalSorter(uses).prepare()
    except CycleError:
        return True
    return False


class _Writer:
    """Writes rules as lines of Lark. Groups become rules too, since llguidance limits nested parentheses."""

    def __init__(self, rules: dict[str, Node], needed: Iterable[str], prefix: str) -> None:
        """Name the rules in `needed`. `prefix` begins all names: upper case for lexemes, lower for rules."""
        self._prefix = prefix
        self._names: dict[Node, str] = {}
        self._rules = rules
        self._todo: list[Node] = []
        for name in needed:
            self._name(Rule(name))

    def text(self, root: str) -> str:
        """Return the whole grammar."""
        lines = [f"start: {self._name(Rule(root))}"]
        # Writing a node may append others to the list.
        for node in self._todo:
            body = self._rules[node.name] if isinstance(node, Rule) else node
            lines.append(f"{self._names[node]}: {self._body(body)}")
        if len(lines) > MAX_RULES:
            raise UsageError(
                f"the grammar has more than {MAX_RULES:,} rules and groups", remedy="merge or remove some"
            )
        return "\n".join(lines) + "\n"

    def _name(self, node: Node) -> str:
        name = self._names.get(node)
        if name is None:
            name = self._names[node] = f"{self._prefix}{len(self._names)}"
            self._todo.append(node)
        return name

    def _body(self, node: Node) -> str:
        if isinstance(node, Choice):
            return " | ".join(map(self._items, node.items))
        return self._items(node)

    def _items(self, node: Node) -> str:
        items = node.items if isinstance(node, Sequence) else (node,)
        return " ".join(filter(None, map(self._item, items))) or '""'

    def _item(self, node: Node) -> str:
        """Return an item of a sequence; "" for an empty text."""
        if isinstance(node, Characters):
            return f"/[{''.join(f'{_code(low)}-{_code(high)}' for low, high in node.ranges)}]/"
        if isinstance(node, Text):
            return " ".join(f"/{_code(ord(char))}/" for char in node.text)
        if isinstance(node, Repeat):
            item = self._item(node.item) if isinstance(node.item, Characters) else self._name(node.item)
            return f"{item}{{{node.low},{'' if node.high is None else node.high}}}"
        return self._name(node)


def _code(point: int) -> str:
    return f"\\x{{{point:x}}}"
