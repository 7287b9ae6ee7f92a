"""Decides which worker answers which lines. It knows numbers of tasks only: no lines, no engines, no network.

Tasks are handed out in groups of neighbours, which have common prefixes, so that each is read by one worker.
Groups shrink towards the end. A worker without work then takes half of the largest group that is left, and
after that copies of the tasks that other workers have had for too long. The first answer counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_MAX_GROUP = 64
"""The largest group. A worker keeps a prefix in its KV cache, so more would not save much."""
_MAX_LOSSES = 4
"""A task that was lost this often with its worker has failed."""
_LOSSES_TOGETHER = 2
"""A task that was lost this often is tried on its own, so that it takes no other tasks with it."""
_COPY_AFTER = 2.0
"""Tasks are copied when they have taken this many times as long as the mean."""


@dataclass(slots=True)
class _Worker:
    capacity: int
    group: deque[int] = field(default_factory=deque)  # not given to the worker yet
    held: dict[int, float] = field(default_factory=dict)  # given to the worker, with the time
    alone: bool = False  # it has one task, which may crash its engine


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
        self._n_timed = 0
        self._seconds = 0.0

    @property
    def n_waiting(self) -> int:
        """The tasks that no worker has."""
        fresh = self._n_tasks - self._next
        return fresh + self._n_grouped + len(self._returned) + len(self._suspects)

    @property
    def workers(self) -> Iterable[str]:
        """The workers that are ready."""
        return self._workers

    def join(self, worker: str, capacity: int) -> None:
        """Add a worker without tasks, which should have `capacity` of them."""
        self._workers[worker] = _Worker(capacity)

    def holds(self, worker: str) -> bool:
        """True if the worker has tasks to answer."""
        return bool(self._workers[worker].held)

    def take(self, worker: str, now: float, before: int) -> list[int]:
        """Return the tasks to give to a worker now. Tasks from `before` on are not handed out yet."""
        state = self._workers[worker]
        if state.alone:
            return []
        if self._suspects and not state.held:
            state.alone = True
            return [self._hand_out(self._suspects.popleft(), worker, now)]
        tasks = []
        for _ in range(self._room(state)):
            task = self._next_task(state, before)
            if task is None:
                break
            tasks.append(self._hand_out(task, worker, now))
        if not tasks and not self.n_waiting:
            tasks = [self._hand_out(task, worker, now) for task in self._late(worker, state, now)]
        return tasks

    def answer(self, worker: str, task: int, now: float) -> bool:
        """A worker has answered a task. False if the task had an answer already."""
        state = self._workers[worker]
        given = state.held.pop(task)
        state.alone = False
        # Another worker may still work on a copy, and hold it until then.
        if self._holders.pop(task, None) is None:
            return False
        self._uncopied.pop(task, None)
        self._losses.pop(task, None)
        self.n_unanswered -= 1
        self._n_timed += 1
        self._seconds += now - given
        return True

    def crash(self, worker: str) -> list[int]:
        """The engine of a worker has died. Return the task that it had on its own, which has failed.

        If it had several, each of them will be tried on its own. The worker must join again.
        """
        alone = self._workers[worker].alone
        tasks = self._remove(worker)
        if alone:
            return tasks
        self._suspects.extend(tasks)
        return []

    def lose(self, worker: str) -> list[int]:
        """A worker is gone. Return the tasks that were lost so often that they have failed."""
        if worker not in self._workers:
            return []
        failed = []
        for task in self._remove(worker):
            self._losses[task] = n_losses = self._losses.get(task, 0) + 1
            if n_losses >= _MAX_LOSSES:
                failed.append(task)
            elif n_losses >= _LOSSES_TOGETHER:
                self._suspects.append(task)
            else:
                self._returned.append(task)
        return failed

    def fail(self, task: int) -> None:
        """A task that `crash` or `lose` returned has an error record."""
        self._losses.pop(task, None)
        self.n_unanswered -= 1

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
