"""The keys of an object that are none of its declared properties. Nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_local.engine.grammar.json_values import PLAIN
from dsmoe_local.engine.grammar.nodes import (
    Characters,
    Choice,
    Node,
    Repeat,
    Text,
    characters,
    intersect,
    sequence,
)


def other_keys(names: Sequence[str]) -> Node:
    """Contents of JSON strings that are none of `names`, without escapes, by which a name could be hidden."""
    anything = Repeat(PLAIN, 0, None)
    followers: dict[str, set[str]] = {"": set()}
    for name in names:
        for index, char in enumerate(name):
            followers.setdefault(name[:index], set()).add(char)
            followers.setdefault(name[: index + 1], set())
    ways: list[Node] = []
    for start, chars in followers.items():
        if any(not _holds(PLAIN, char) for char in start):
            continue
        if start not in names:
            ways.append(Text(start))
        others = intersect(PLAIN, characters([(ord(char), ord(char)) for char in chars], negated=True))
        ways.append(sequence(Text(start), others, anything))
    return Choice(tuple(ways))


def _holds(some: Characters, char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in some.ranges)
