"""A radix tree of the KV cache: which sequence owns which cells, and which sequences share a prefix.

It mirrors llama.cpp's cache and calls no native code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Run:
    """A node: consecutive cells with the same owners. `exact`: they were computed after exactly the tokens
    before them in the tree, which is not true for shifted cells.
    """

    __slots__ = ("children", "exact", "n_hits", "owners", "parent", "tokens")

    def __init__(
        self, parent: Run | None, tokens: list[int], owners: set[int], *, exact: bool = True
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.owners = owners
        self.exact = exact
        self.n_hits = 0  # how many other requests share this prefix
        self.children: list[Run] = []


class RadixTree:
    """The sequences of a cache. A sequence is a path from the root; each of its runs has it as an owner.

    Unlike in other radix trees, two children may begin with the same token, since the same text may have been
    computed twice in different cells. A cell holds one token.
    """

    def __init__(self) -> None:
        self._root = Run(None, [], set())
        self._tails: dict[int, Run] = {}
        self._lengths: dict[int, int] = {}
        self.n_cells = 0

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of all sequences that are not empty."""
        return tuple(self._tails)

    def length(self, sequence: int) -> int:
        """Return the number of tokens of a sequence."""
        return self._lengths.get(sequence, 0)

    def tokens(self, sequence: int) -> list[int]:
        """Return the tokens of a sequence."""
        return [token_id for run in self._path(sequence) for token_id in run.tokens]

    def extend(self, sequence: int, token_ids: Sequence[int], *, exact: bool = True) -> None:
        """Append tokens to a sequence, in new cells."""
        if not token_ids:
            return
        tail = self._tails.get(sequence, self._root)
        alike = tail.exact == exact and not tail.n_hits
        if tail is not self._root and alike and len(tail.owners) == 1 and not tail.children:
            tail.tokens.extend(token_ids)
        else:
            tail = self._attach(Run(tail, list(token_ids), {sequence}, exact=exact))
        self._tails[sequence] = tail
        self._lengths[sequence] = self.length(sequence) + len(token_ids)
        self.n_cells += len(token_ids)

    def share(self, source: int, target: int, count: int) -> None:
        """Make the empty sequence `target` an owner of the first `count` cells of `source`."""
        assert target not in self._tails
        if not count:
            return
        rest = count
        for run in self._path(source):
            run.owners.add(target)
            if rest <= len(run.tokens):
                if rest < len(run.tokens):
                    self._split(run, rest).owners.discard(target)
                self._tails[target] = run
                break
            rest -= len(run.tokens)
        self._lengths[target] = count

    def truncate(self, sequence: int, count: int) -> None:
        """Cut a sequence to its first `count` tokens. Cells without an owner are free."""
        excess = self.length(sequence) - count
        while excess > 0:
            run = self._tails[sequence]
            if excess < len(run.tokens):
                self._split(run, len(run.tokens) - excess)
                run = self._tails[sequence]
            excess -= len(run.tokens)
            run.owners.discard(sequence)
            assert run.parent is not None
            self._tails[sequence] = run.parent
            if not run.owners:
                run.parent.children.remove(run)
                self.n_cells -= len(run.tokens)
        if count:
            self._lengths[sequence] = min(count, self.length(sequence))
        else:
            self._tails.pop(sequence, None)
            self._lengths.pop(sequence, None)

    def longest(self, token_ids: list[int], most: int) -> tuple[int, frozenset[int]]:
        """Return the length of the longest cached prefix of the first `most` tokens, and its owners."""
        best, owners = 0, frozenset[int]()
        pending = [(self._root, 0)]
        while pending:
            run, depth = pending.pop()
            for child in run.children:
                if not child.exact or depth >= most or child.tokens[0] != token_ids[depth]:
                    continue
                same = common_length(child.tokens, token_ids, depth, most)
                if depth + same > best:
                    best, owners = depth + same, frozenset(child.owners)
                elif depth + same == best:
                    owners |= child.owners
                if same == len(child.tokens):
                    pending.append((child, depth + same))
        return best, owners

    def hit(self, sequence: int, count: int) -> None:
        """Count a request that shares the first `count` tokens of a sequence."""
        for run in self._path(sequence):
            if count <= 0:
                break
            run.n_hits += 1
            count -= len(run.tokens)

    def n_wanted(self, sequence: int) -> int:
        """Return how many first tokens of a sequence other requests have shared."""
        depth = wanted = 0
        for run in self._path(sequence):
            depth += len(run.tokens)
            if run.n_hits:
                wanted = depth
        return wanted

    def n_shared(self, sequence: int) -> int:
        """Return how many first cells of a sequence have other owners, too."""
        depth = shared = 0
        for run in self._path(sequence):
            depth += len(run.tokens)
            if len(run.owners) > 1:
                shared = depth
        return shared

    def n_kept(self, owners: set[int], source: int | None, count: int) -> int:
        """Return the cells in use if only `owners` and the first `count` cells of `source` were kept."""
        path: dict[int, int] = {}
        for run in self._path(source) if source is not None else ():
            path[id(run)] = max(0, min(count, len(run.tokens)))
            count -= len(run.tokens)
        return sum(
            len(run.tokens) if not owners.isdisjoint(run.owners) else path.get(id(run), 0)
            for run in self._runs()
        )

    def check(self) -> None:
        """Raise AssertionError unless owners, lengths and the number of cells are consistent."""
        found: dict[int, int] = {}
        for run in self._runs():
            assert run.tokens, "an empty run"
            assert run.owners, "cells that nobody owns"
            assert run.parent is self._root or (run.parent is not None and run.owners <= run.parent.owners)
            for owner in run.owners:
                found[owner] = found.get(owner, 0) + len(run.tokens)
        assert found == self._lengths, "lengths"
        assert set(self._tails) == set(self._lengths), "tails"
        assert all(sequence in tail.owners for sequence, tail in self._tails.items()), "a foreign tail"
        for sequence, length in self._lengths.items():
            assert sum(len(run.tokens) for run in self._path(sequence)) == length, "a broken path"
        assert self.n_cells == sum(len(run.tokens) for run in self._runs()), "cells"

    def _path(self, sequence: int) -> list[Run]:
        path = []
        run: Run | None = self._tails.get(sequence)
        while run is not None and run is not self._root:
            path.append(run)
            run = run.parent
        path.reverse()
        return path

    def _runs(self) -> Iterator[Run]:
        pending = list(self._root.children)
        while pending:
            run = pending.pop()
            yield run
            pending.extend(run.children)

    def _attach(self, run: Run) -> Run:
        assert run.parent is not None
        run.parent.children.append(run)
        return run

    def _split(self, run: Run, count: int) -> Run:
        """Split a run behind its first `count` cells and return the second half."""
        rest = Run(run, run.tokens[count:], set(run.owners), exact=run.exact)
        rest.n_hits = run.n_hits
        rest.children = run.children
        for child in rest.children:
            child.parent = rest
        del run.tokens[count:]
        run.children = [rest]
        for owner in rest.owners:
            if self._tails.get(owner) is run:
                self._tails[owner] = rest
        return rest


def common_length(run: list[int], token_ids: list[int], start: int, most: int) -> int:
    """Return the length of the common prefix of `run` and `token_ids[start:most]`."""
    end = min(len(run), most - start)
    low, step = 0, 32
    # Comparing slices is fast: double the step while they are equal, then bisect.
    while low < end and run[low : low + step] == token_ids[start + low : start + low + step]:
        low, step = low + step, step * 2
    high = min(end, low + step)
    low = min(low, end)
    while low < high:
        middle = (low + high + 1) // 2
        if run[low:middle] == token_ids[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low
