"""Decides which worker answers which lines. It knows numbers of tasks only: no lines, no engines, no network.

Tasks are handed out in groups of neighbours, which have common prefixes, so that each is read by one worker.
Groups shrink towards the end. A worker without work then takes half of the largest group that is left, and
after that copies of the tasks that other workers have had for too long. The first answer counts.

A task that may have ended its worker is a suspect: it is tried alone, and again alone elsewhere, before it
has failed. So a broken worker does not fail tasks that others can answer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

_MAX_GROUP = 64
"""The largest group. A worker keeps a prefix in its KV cache, so more would not save much."""
_LOSSES_TOGETHER = 2
"""A task that was lost this often with its worker is a suspect."""
_MAX_TRIALS = 2
"""A suspect that ended this many workers alone has failed."""
_MAX_FAILURES = 3
"""A worker that ended this often without an answer in between is bad, if other workers do better."""
_COPY_AFTER = 2.0
"""Tasks are copied when they have taken this many times as long as the mean."""


@dataclass(slots=True)
class _Worker:
    capacity: int
    group: deque[int] = field(default_factory=deque)  # not given to the worker yet
    held: dict[int, float] = field(default_factory=dict)  # given to the worker, with the time
    alone: bool = False  # it has one task, a suspect
    drains: bool = False  # it gets no more tasks, so that it can take a suspect


class Scheduler:
    """The tasks from 0 to `n_tasks` - 1, and the workers that have some of them.

    `group` is called with the first task and the largest size of a group before it is handed out, and returns
    the size, which may be smaller. `ordered`: tasks should be answered in order, so groups are small.
    """

    def __init__(self, n_tasks: int, group: Callable[[int, int], int], *, ordered: bool = False) -> None:
        self.n_unanswered = n_tasks
        self._n_tasks = n_tasks
        self._group = group
        self._ordered = ordered
        self._next = 0  # the first task that belongs to no group
        self._n_grouped = 0  # tasks in groups
        self._returned: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._workers: dict[str, _Worker] = {}
        self._holders: dict[int, list[str]] = {}  # of each task that is being answered
        self._uncopied: dict[int, str] = {}  # tasks with one holder, the oldest first
        self._losses: dict[int, int] = {}
        self._nodes: dict[str, str] = {}  # of the workers that are ready, or will join again after a crash
        # The workers, and their nodes, that a suspect has ended.
        self._trials: dict[int, list[tuple[str, str]]] = {}
        # Crashes of workers, and losses on nodes, since the last answer from there.
        self._failures: Counter[str] = Counter()
        self._guilty: set[str] = set()  # workers and nodes whose suspects were answered elsewhere
        self._n_timed = 0
        self._seconds = 0.0

    @property
    def n_waiting(self) -> int:
        """The tasks that no worker has."""
        fresh = self._n_tasks - self._next
        return fresh + self._n_grouped + len(self._returned) + len(self._suspects)

    @property
    def n_suspects(self) -> int:
        """The suspects that no worker has. Not every worker may take them."""
        return len(self._suspects)

    def join(self, worker: str, capacity: int, node: str = "") -> None:
        """Add a worker of a node without tasks, which should have `capacity` of them."""
        self._workers[worker] = _Worker(capacity)
        self._nodes[worker] = node

    def is_bad(self, worker: str, node: str) -> bool:
        """True if a worker, or those of its node, end again and again with tasks that others can answer."""
        if not any(other != worker for other in self._nodes):
            return False
        return any(self._failures[name] >= _MAX_FAILURES and name in self._guilty for name in (worker, node))

    def holds(self, worker: str) -> bool:
        """True if the worker has tasks to answer."""
        return bool(self._workers[worker].held)

    def is_alone(self, worker: str) -> bool:
        """True if the worker has one task, a suspect."""
        return self._workers[worker].alone

    def take(self, worker: str, now: float, before: int) -> list[int]:
        """Return the tasks to give to a worker now. Tasks from `before` on are not handed out yet."""
        state = self._workers[worker]
        if state.alone:
            return []
        suspect = self._suspect_for(worker)
        if suspect is None:
            state.drains = False
        elif not state.held:
            self._suspects.remove(suspect)
            state.alone = True
            return [self._hand_out(suspect, worker, now)]
        elif state.drains or not any(other.alone or other.drains for other in self._workers.values()):
            # A worker that has just joined is often the one that suspects have ended before.
            state.drains = True
            return []
        tasks = []
        room = self._room(state)
        for _ in range(room):
            task = self._next_task(state, before)
            if task is None:
                break
            tasks.append(self._hand_out(task, worker, now))
        # With room but no tasks, the worker waits for `before`, which a late task may hold back.
        if not tasks and (room > 0 or not self.n_waiting):
            tasks = [self._hand_out(task, worker, now) for task in self._late(worker, state, now)]
        return tasks

    def answer(self, worker: str, task: int, now: float) -> bool:
        """A worker has answered a task. False if the task had an answer already."""
        state = self._workers[worker]
        given = state.held.pop(task)
        state.alone = False
        for name in (worker, self._nodes[worker]):
            self._failures.pop(name, None)
            self._guilty.discard(name)
        # Another worker may still work on a copy, and hold it until then.
        if self._holders.pop(task, None) is None:
            return False
        self._uncopied.pop(task, None)
        self._losses.pop(task, None)
        for trial in self._trials.pop(task, ()):
            self._guilty.update(name for name in trial if name not in (worker, self._nodes[worker]))
        self.n_unanswered -= 1
        self._n_timed += 1
        self._seconds += now - given
        return True

    def crash(self, worker: str) -> list[int]:
        """The engine of a worker has died. Return the task that it had alone, if this task has failed.

        The worker must join again, or be lost.
        """
        alone = self._workers[worker].alone
        self._failures[worker] += 1
        tasks = self._remove(worker)
        if alone:
            return [task for task in tasks if self._tried(task, worker, self._nodes[worker])]
        self._suspects.extend(tasks)
        return []

    def lose(self, worker: str) -> list[int]:
        """A worker is gone. Return the task that it had alone, if this task has failed."""
        node = self._nodes.pop(worker, "")
        if worker not in self._workers:
            return []
        alone = self._workers[worker].alone
        self._failures[node] += 1
        tasks = self._remove(worker)
        if alone:
            return [task for task in tasks if self._tried(task, worker, node)]
        for task in reversed(tasks):
            self._losses[task] = n_losses = self._losses.get(task, 0) + 1
            if n_losses >= _LOSSES_TOGETHER:
                self._suspects.append(task)
            else:
                self._returned.appendleft(task)  # first, so that one that ends its workers is found soon
        return []

    def fail(self, task: int) -> None:
        """A task that `crash` or `lose` returned has an error record."""
        self._losses.pop(task, None)
        self._trials.pop(task, None)
        self.n_unanswered -= 1

    def _tried(self, task: int, worker: str, node: str) -> bool:
        """A suspect has ended a worker. True if it has failed; if not, it is tried elsewhere."""
        trials = self._trials.setdefault(task, [])
        trials.append((worker, node))
        if len(trials) >= _MAX_TRIALS or (worker in self._nodes and not self._is_new_to_any(task)):
            return True
        self._suspects.appendleft(task)  # first, so that a bad worker is found soon
        return False

    def _suspect_for(self, worker: str) -> int | None:
        """Return the first suspect that a worker may take: one that has not ended it or its node before.

        It may take any suspect that has no other place to go.
        """
        for task in self._suspects:
            if self._is_new(task, worker) or not self._is_new_to_any(task):
                return task
        return None

    def _is_new_to_any(self, task: int) -> bool:
        return any(self._is_new(task, worker) for worker in self._nodes)

    def _is_new(self, task: int, worker: str) -> bool:
        """True if a suspect was not tried on a worker's node; if there is only one node, with the worker."""
        trials = self._trials.get(task)
        if not trials:
            return True
        node = self._nodes[worker]
        if any(other != node for other in self._nodes.values()):
            return all(tried != node for _, tried in trials)
        return all(tried != worker for tried, _ in trials)

    def _remove(self, worker: str) -> list[int]:
        """Remove a worker. Return its tasks that no other worker has."""
        state = self._workers.pop(worker)
        self._returned.extend(state.group)
        self._n_grouped -= len(state.group)
        orphans = []
        for task in state.held:
            holders = self._holders.get(task, [])
            if worker not in holders:
                continue  # a copy that is not needed any more
            holders.remove(worker)
            if not holders:
                del self._holders[task]
                self._uncopied.pop(task, None)
                orphans.append(task)
        return orphans

    def _room(self, state: _Worker) -> int:
        """Return how many more tasks a worker should get: towards the end, only its share."""
        share = -(-(self.n_waiting + len(self._holders)) // len(self._workers))
        return min(state.capacity, share) - len(state.held)

    def _next_task(self, state: _Worker, before: int) -> int | None:
        if self._returned:
            return self._returned.popleft()
        if not state.group and not self._refill(state, before):
            return None
        if state.group[0] >= before:
            return None
        self._n_grouped -= 1
        return state.group.popleft()

    def _refill(self, state: _Worker, before: int) -> bool:
        """Give a worker the next group, or half of another worker's group. False if there is none."""
        n_left = self._n_tasks - self._next
        if n_left:
            if self._next >= before:
                return False
            most = state.capacity if self._ordered else max(state.capacity, _MAX_GROUP)
            fair = n_left // (2 * len(self._workers))
            size = self._group(self._next, min(n_left, max(state.capacity, min(fair, most))))
            state.group.extend(range(self._next, self._next + size))
            self._next += size
            self._n_grouped += size
            return True
        if not self._n_grouped:
            return False
        largest = max(self._workers.values(), key=lambda other: len(other.group))
        for _ in range(-(-len(largest.group) // 2)):
            state.group.appendleft(largest.group.pop())
        return bool(state.group)

    def _late(self, worker: str, state: _Worker, now: float) -> list[int]:
        """Return tasks that other workers have had for too long. No task is copied twice."""
        late: list[int] = []
        if not self._n_timed:
            return late
        limit = _COPY_AFTER * self._seconds / self._n_timed
        for task, other in self._uncopied.items():
            full = len(late) == state.capacity - len(state.held)
            if full or now - self._workers[other].held[task] <= limit:
                break
            if other != worker:
                late.append(task)
        return late

    def _hand_out(self, task: int, worker: str, now: float) -> int:
        state = self._workers[worker]
        state.held[task] = now
        holders = self._holders.setdefault(task, [])
        holders.append(worker)
        if len(holders) == 1 and not state.alone:
            self._uncopied[task] = worker
        else:
            self._uncopied.pop(task, None)
        return task
