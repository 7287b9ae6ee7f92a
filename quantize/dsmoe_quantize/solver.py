"""One option for each group, so that the errors' sum is least and no budget is exceeded. Plain numbers.

A multiple-choice knapsack with several budgets. A price for each budget (Lagrange multipliers) gives a lower
bound of the error and, for each option, the least by which any solution with it exceeds that bound; whatever
exceeds a known solution is ruled out. What is left is searched in depth. Where that takes too long, each
option of the group with the largest step makes a problem of its own, with better prices; that with the lowest
bound is the next to be divided. All this ends with a proof that nothing is better, or after a number of
nodes, and then the bound says how far it can be off.
The same problem has the same solution everywhere: nothing here depends on time or chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsmoe_quantize.relaxation import Floats, Option, Problem, Relaxation

MAX_NODES = 100_000
"""Nodes of the search: about a second."""
_NODES_AT_ONCE = 4000
_CLOSE = 0.002  # of the error: less is not worth branches
_MAX_PROBLEMS = 40
_MAX_MOVES = 400  # that are looked at in pairs
_MAX_BRANCHES = 4  # groups whose options are tried one by one, each with prices of its own
_EXACT = 1e-12  # of the error: what rounding may add to a bound


@dataclass(frozen=True, slots=True)
class Solution:
    """`picks` is the option of each group. No solution has an error below `bound`.

    `prices` says what the last unit of each budget is worth: how much error one more would save, about.
    """

    picks: tuple[int, ...]
    error: float
    costs: tuple[int, ...]
    bound: float
    prices: tuple[float, ...]
    is_optimal: bool


def solve(problem: Problem, *, quick: bool = False) -> Solution | None:
    """The best solution found, which is the best there is where `is_optimal`; None if none was found. `quick`
    spends little on the proof.
    """
    kept = [_undominated(options) for options in problem.groups]
    for k, limit in enumerate(problem.limits):
        least = (
            min(options[at].costs[k] for at in alive)
            for options, alive in zip(problem.groups, kept, strict=True)
        )
        if sum(least) > limit:
            return None
    solver = _Solver(problem, _NODES_AT_ONCE if quick else MAX_NODES)
    bound = solver.explore(kept, 0 if quick else _MAX_BRANCHES)
    if solver.best is None:
        return None
    chosen = [options[at] for options, at in zip(problem.groups, solver.best, strict=True)]
    error = float(sum(option.error for option in chosen))
    return Solution(
        tuple(solver.best),
        error,
        tuple(sum(option.costs[k] for option in chosen) for k in range(len(problem.limits))),
        min(error, bound),
        solver.prices,
        bound == np.inf,
    )


class _Solver:
    """The best solution so far, and the parts of the problem that are still to be looked into."""

    def __init__(self, problem: Problem, max_nodes: int) -> None:
        self._problem = problem
        self._nodes_left = max_nodes
        self._problems_left = _MAX_PROBLEMS
        self.best: list[int] | None = None
        self.best_error = np.inf
        self.prices: tuple[float, ...] = ()

    def explore(self, kept: list[list[int]], max_branches: int) -> float:
        """Look for better solutions with the options in `kept`. No solution that it missed has an error below
        what it returns: infinity if it missed none.
        """
        first = self._look(kept, None, max_branches)
        self.prices = first.prices_per_unit
        parts, missed = [first], np.inf
        while parts:
            # The part that may hold the best comes first, not the last one that was made.
            part = heapq.heappop(parts)
            if part.bound >= self.best_error * (1 - _CLOSE) or self._is_spent:
                return min(missed, part.bound)
            group = part.table.largest_step(part.kept, self._problem) if part.branches_left else None
            if group is None:
                missed = min(missed, part.bound)
                continue
            for at in part.kept[group]:
                narrower = [*part.kept[:group], [at], *part.kept[group + 1 :]]
                found = self._look(narrower, part.prices, part.branches_left - 1)
                if found.bound < np.inf:
                    heapq.heappush(parts, found)
        return missed

    @property
    def _is_spent(self) -> bool:
        return self._nodes_left <= 0 or self._problems_left <= 0

    def _look(self, kept: list[list[int]], hint: Floats | None, branches_left: int) -> _Part:
        """Search a part for a while."""
        self._problems_left -= 1
        table = Relaxation.of(self._problem, kept)
        prices = table.best_prices(hint, quick=not branches_left)
        search = _Search(table, prices, self.best_error)
        search.run(min(self._nodes_left, _NODES_AT_ONCE if branches_left else self._nodes_left))
        self._nodes_left -= search.n_nodes
        if search.best is not None:
            self.best_error = search.best_error
            self.best = [alive[at] for alive, at in zip(kept, search.best, strict=True)]
        # What the search ruled out stays so: the error to beat only falls.
        left = [[alive[at] for at in search.alive(group)] or alive[:1] for group, alive in enumerate(kept)]
        bound = np.inf if search.is_complete else search.bound
        return _Part(bound, self._problems_left, left, table, prices, branches_left)


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    """A part of the problem after a first look: no solution in it that is not known has an error below
    `bound`. `number` settles the order of equal ones.
    """

    bound: float
    number: int
    kept: list[list[int]] = field(compare=False)
    table: Relaxation = field(compare=False)
    prices: Floats = field(compare=False)
    branches_left: int = field(compare=False)

    @property
    def prices_per_unit(self) -> tuple[float, ...]:
        """What the last unit of each budget is worth."""
        return tuple(float(each) for each in self.prices / self.table.scale)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Options for which no other is at least as good in everything; of equal ones the first."""
    kept: list[int] = []
    for at in sorted(range(len(options)), key=lambda at: (options[at].error, options[at].costs, at)):
        costs = options[at].costs
        if not any(all(a <= b for a, b in zip(options[other].costs, costs, strict=True)) for other in kept):
            kept.append(at)
    return kept


def _minus(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(first, second, strict=True))


class _Search:
    """A search in depth, groups with the largest steps first, options by what they exceed the bound by."""

    def __init__(self, table: Relaxation, prices: Floats, error_to_beat: float) -> None:
        self._limits = table.limits
        self.n_nodes = 0
        priced = table.priced(prices)
        over = priced - priced.min(axis=1, keepdims=True)
        self.bound = table.bound(prices)
        spread = (table.costs.max(axis=2) - table.costs.min(axis=2)).sum(axis=0) if len(prices) else None
        n_groups = len(table.errors)
        self._order = sorted(range(n_groups), key=lambda group: -spread[group] if spread is not None else 0)
        self._options = [
            [
                (float(over[group, at]), float(table.errors[group, at]), table.exact[group][at], int(at))
                for at in np.argsort(over[group], kind="stable")
                if np.isfinite(table.errors[group, at])
            ]
            for group in self._order
        ]
        self._rest = self._least_rest()
        self.best: list[int] | None = None
        self.best_error = error_to_beat
        self.is_complete = False

    def run(self, max_nodes: int) -> None:
        """Find a first solution, make it better by single steps, then search."""
        if self.bound >= self.best_error * (1 - _EXACT):
            self.is_complete = True
            return
        first = self._repaired()
        if first is not None:
            self._take(self._improved(first))
        self._descend(max_nodes)

    def alive(self, group: int) -> list[int]:
        """The options of a group that a better solution may still have, likely ones first."""
        room = self.best_error * (1 - _EXACT) - self.bound
        return [option[3] for option in self._options[self._order.index(group)] if option[0] < room]

    def _least_rest(self) -> list[tuple[int, ...]]:
        """What the groups from each depth on take from each budget at least."""
        rest = [tuple(0 for _ in self._limits)]
        for options in reversed(self._options):
            least = (min(option[2][k] for option in options) for k in range(len(self._limits)))
            rest.append(tuple(a + b for a, b in zip(rest[-1], least, strict=True)))
        return rest[::-1]

    def _take(self, ranks: list[int]) -> None:
        error = self._error_of(ranks)
        if error < self.best_error:
            self.best_error = error
            self.best = [0] * len(self._order)
            for group, options, rank in zip(self._order, self._options, ranks, strict=True):
                self.best[group] = options[rank][3]

    def _used(self, ranks: list[int]) -> list[int]:
        picked = [options[rank][2] for options, rank in zip(self._options, ranks, strict=True)]
        return [sum(costs[k] for costs in picked) for k in range(len(self._limits))]

    def _excess(self, used: Sequence[int]) -> float:
        return sum(max(0, a - b) / max(b, 1) for a, b in zip(used, self._limits, strict=True))

    def _repaired(self) -> list[int] | None:
        """The options that the prices choose, exchanged one by one until they fit; None if that fails."""
        ranks = [0] * len(self._options)
        used = self._used(ranks)
        while excess := self._excess(used):
            best: tuple[float, int, int, list[int]] | None = None
            for depth, options in enumerate(self._options):
                now = options[ranks[depth]]
                for rank, option in enumerate(options):
                    after = [u - a + b for u, a, b in zip(used, now[2], option[2], strict=True)]
                    gain = excess - self._excess(after)
                    if gain > 0:
                        rate = (option[0] - now[0]) / gain
                        if best is None or rate < best[0]:
                            best = (rate, depth, rank, after)
            if best is None:
                return None
            ranks[best[1]], used = best[2], best[3]
        return ranks

    def _improved(self, ranks: list[int]) -> list[int]:
        """Exchanges in one or two groups that lower the error and fit, the best first, until none is left."""
        while True:
            room = np.array(self._limits, np.float64) - self._used(ranks)
            moves = self._moves(ranks)
            errors = np.array([move[1] for move in moves])
            groups = np.array([move[2] for move in moves])
            total = errors[:, None] + errors
            total[(groups[:, None] == groups) & (groups >= 0)] = np.inf
            for k, left in enumerate(room):
                costs = np.array([move[4][k] for move in moves], np.float64)
                total[costs[:, None] + costs > left] = np.inf
            best = int(np.argmin(total))
            if not total.flat[best] < -_EXACT * self._error_of(ranks):
                return ranks
            for at in divmod(best, len(moves)):
                if groups[at] >= 0:
                    ranks[groups[at]] = moves[at][3]

    def _moves(self, ranks: list[int]) -> list[tuple[float, float, int, int, tuple[int, ...]]]:
        """Exchanges in one group, those first that the prices hold least against, and the one that does
        nothing: the change by the prices and of the error, the group and its option, the change of the costs.
        """
        moves = [
            (abs(option[0] - now[0]), option[1] - now[1], depth, rank, _minus(option[2], now[2]))
            for depth, options in enumerate(self._options)
            for now in (options[ranks[depth]],)
            for rank, option in enumerate(options)
            if option is not now
        ]
        nothing = (0.0, 0.0, -1, -1, (0,) * len(self._limits))
        return [nothing, *sorted(moves)[:_MAX_MOVES]]

    def _error_of(self, ranks: list[int]) -> float:
        return sum(options[rank][1] for options, rank in zip(self._options, ranks, strict=True))

    def _descend(self, max_nodes: int) -> None:
        n_groups, n_budgets = len(self._options), len(self._limits)
        ranks, over, errors = [-1] * n_groups, [0.0] * (n_groups + 1), [0.0] * (n_groups + 1)
        used = [[0] * n_budgets for _ in range(n_groups + 1)]
        depth = 0
        while depth >= 0:
            if depth == n_groups:
                if errors[depth] < self.best_error:
                    self._take(ranks)
                depth -= 1
                continue
            ranks[depth] += 1
            options = self._options[depth]
            ceiling = self.best_error * (1 - _EXACT)
            if ranks[depth] == len(options) or self.bound + over[depth] + options[ranks[depth]][0] >= ceiling:
                # Options are in the order of what they add: none of those that follow can do.
                ranks[depth] = -1
                depth -= 1
                continue
            if self.n_nodes >= max_nodes:
                return
            self.n_nodes += 1
            more, error, costs, _ = options[ranks[depth]]
            after = [a + b for a, b in zip(used[depth], costs, strict=True)]
            rest = self._rest[depth + 1]
            if all(a + b <= c for a, b, c in zip(after, rest, self._limits, strict=True)):
                depth += 1
                over[depth], errors[depth] = over[depth - 1] + more, errors[depth - 1] + error
                used[depth] = after
        self.is_complete = True
