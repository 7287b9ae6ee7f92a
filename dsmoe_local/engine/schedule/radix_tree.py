"""A radix tree of the KV cache: which sequence owns which cells, and which sequences share a prefix.

It mirrors llama.cpp's cache and calls no native code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsmoe_local.base.sequences import n_common


class Node:
    """Consecutive cells with the same owners.

    `tokens` are the tokens of the cells. `owners` are the ids of the sequences that contain them. `exact` is
    false for cells that were computed after other tokens than those before them in the tree, such as shifted
    cells. Other sequences must not share these.
    """

    __slots__ = ("children", "exact", "n_hits", "owners", "parent", "tokens")

    def __init__(
        self, parent: Node | None, tokens: list[int], owners: set[int], *, exact: bool = True
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.owners = owners
        self.exact = exact
        self.n_hits = 0  # the number of other requests that had this prefix
        self.children: list[Node] = []


class RadixTree:
    """The sequences of a cache. A sequence is a path from the root; it owns all nodes of its path.

    A cell holds one token. Unlike in other radix trees, two children may begin with the same token, since the
    same text may be in the cache twice.
    """

    def __init__(self) -> None:
        self._root = Node(None, [], set())
        self._tails: dict[int, Node] = {}
        self._lengths: dict[int, int] = {}
        self.n_cells = 0

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the sequences that are not empty."""
        return tuple(self._tails)

    def length(self, sequence: int) -> int:
        """Return the number of tokens of a sequence."""
        return self._lengths.get(sequence, 0)

    def tokens(self, sequence: int) -> list[int]:
        """Return the tokens of a sequence."""
        return [token_id for node in self._path(sequence) for token_id in node.tokens]

    def extend(self, sequence: int, token_ids: Sequence[int], *, exact: bool = True) -> None:
        """Append tokens to a sequence, in new cells."""
        if not token_ids:
            return
        tail = self._tails.get(sequence, self._root)
        alike = tail.exact == exact and not tail.n_hits
        if tail is not self._root and alike and len(tail.owners) == 1 and not tail.children:
            tail.tokens.extend(token_ids)
        else:
            node = Node(tail, list(token_ids), {sequence}, exact=exact)
            tail.children.append(node)
            tail = node
        self._tails[sequence] = tail
        self._lengths[sequence] = self.length(sequence) + len(token_ids)
        self.n_cells += len(token_ids)

    def share(self, source: int, target: int, count: int) -> None:
        """Make the empty sequence `target` an owner of the first `count` cells of `source`."""
        assert target not in self._tails
        if not count:
            return
        rest = count
        for node in self._path(source):
            node.owners.add(target)
            if rest <= len(node.tokens):
                if rest < len(node.tokens):
                    self._split(node, rest).owners.discard(target)
                self._tails[target] = node
                break
            rest -= len(node.tokens)
        self._lengths[target] = count

    def truncate(self, sequence: int, count: int) -> None:
        """Cut a sequence to its first `count` tokens. Cells without an owner become free."""
        excess = self.length(sequence) - count
        while excess > 0:
            node = self._tails[sequence]
            if excess < len(node.tokens):
                self._split(node, len(node.tokens) - excess)
                node = self._tails[sequence]
            excess -= len(node.tokens)
            node.owners.discard(sequence)
            assert node.parent is not None
            self._tails[sequence] = node.parent
            if not node.owners:
                node.parent.children.remove(node)
                self.n_cells -= len(node.tokens)
        if count:
            self._lengths[sequence] = min(count, self.length(sequence))
        else:
            self._tails.pop(sequence, None)
            self._lengths.pop(sequence, None)

    def longest(self, token_ids: list[int], most: int) -> tuple[int, frozenset[int]]:
        """Return the length of the longest exact prefix of `token_ids[:most]` in the tree, and its owners."""
        best, owners = 0, frozenset[int]()
        pending = [(self._root, 0)]
        while pending:
            node, depth = pending.pop()
            for child in node.children:
                if not child.exact or depth >= most or child.tokens[0] != token_ids[depth]:
                    continue
                same = n_common(child.tokens, token_ids, depth, most)
                if depth + same > best:
                    best, owners = depth + same, frozenset(child.owners)
                elif depth + same == best:
                    owners |= child.owners
                if same == len(child.tokens):
                    pending.append((child, depth + same))
        return best, owners

    def hit(self, sequence: int, count: int) -> None:
        """Record that another request has the first `count` tokens of a sequence."""
        for node in self._path(sequence):
            if count <= 0:
                break
            node.n_hits += 1
            count -= len(node.tokens)

    def n_wanted(self, sequence: int) -> int:
        """Return the length of the longest prefix of a sequence that another request had (see `hit`)."""
        depth = wanted = 0
        for node in self._path(sequence):
            depth += len(node.tokens)
            if node.n_hits:
                wanted = depth
        return wanted

    def n_shared(self, sequence: int) -> int:
        """Return the number of first cells that a sequence shares with other owners."""
        depth = shared = 0
        for node in self._path(sequence):
            depth += len(node.tokens)
            if len(node.owners) > 1:
                shared = depth
        return shared

    def n_kept(self, owners: set[int], source: int | None, count: int) -> int:
        """Return the number of distinct cells of `owners` and of the first `count` tokens of `source`."""
        path: dict[int, int] = {}
        for node in self._path(source) if source is not None else ():
            path[id(node)] = max(0, min(count, len(node.tokens)))
            count -= len(node.tokens)
        return sum(
            len(node.tokens) if not owners.isdisjoint(node.owners) else path.get(id(node), 0)
            for node in self._nodes()
        )

    def check(self) -> None:
        """Raise AssertionError unless owners, lengths and the number of cells are consistent."""
        found: dict[int, int] = {}
        for node in self._nodes():
            assert node.tokens, "an empty node"
            assert node.owners, "cells without an owner"
            assert node.parent is self._root or (
                node.parent is not None and node.owners <= node.parent.owners
            )
            for owner in node.owners:
                found[owner] = found.get(owner, 0) + len(node.tokens)
        assert found == self._lengths, "lengths"
        assert set(self._tails) == set(self._lengths), "tails"
        assert all(sequence in tail.owners for sequence, tail in self._tails.items()), "a foreign tail"
        for sequence, length in self._lengths.items():
            assert sum(len(node.tokens) for node in self._path(sequence)) == length, "a broken path"
        assert self.n_cells == sum(len(node.tokens) for node in self._nodes()), "cells"

    def _path(self, sequence: int) -> list[Node]:
        path = []
        node: Node | None = self._tails.get(sequence)
        while node is not None and node is not self._root:
            path.append(node)
            node = node.parent
        path.reverse()
        return path

    def _nodes(self) -> Iterator[Node]:
        pending = list(self._root.children)
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children)

    def _split(self, node: Node, count: int) -> Node:
        """Split a node after its first `count` cells and return the second half."""
        rest = Node(node, node.tokens[count:], set(node.owners), exact=node.exact)
        rest.n_hits = node.n_hits
        rest.children = node.children
        for child in rest.children:
            child.parent = rest
        del node.tokens[count:]
        node.children = [rest]
        for owner in rest.owners:
            if self._tails.get(owner) is node:
                self._tails[owner] = rest
        return rest
