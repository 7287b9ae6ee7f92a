"""A cluster without processes, in simulated time: workers of different speeds that die, hang and crash."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe_local.batch.cluster.interface import Answer, Event, Item, Joined, Lost, Report, Reported
from dsmoe_local.batch.lines import Line
from dsmoe_local.engine.errors import EngineCrashError
from dsmoe_local.engine.types import ModelInfo

CRASH = EngineCrashError("the engine was killed by SIGSEGV")
INFO = ModelInfo(
    path=Path("simulated.gguf"),
    name="simulated",
    architecture="deepseek",
    n_context=4096,
    n_context_trained=4096,
    n_vocab=257,
    n_parameters=0,
    n_bytes=0,
    n_routed_experts=64,
    n_experts_per_token=6,
    n_choosable_experts=64,
    n_threads=1,
    template=None,
)
_REST = json.dumps({"text": "word " * 40, "finish_reason": "stop", "usage": {"prompt_tokens": 50}})[
    1:
].encode()
_START_SECONDS = 30.0
_HEARTBEAT_SECONDS = 3.0


def record(line: Line) -> bytes:
    """Return a record as long as a short reply's."""
    return b'{"id": "%b", %b\n' % (line.id.encode(), _REST)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How workers behave.

    A line takes `seconds`, log-normally distributed with `spread`, on a worker of mean speed; the speeds of
    workers are distributed likewise with `speed_spread`. `n_slow` workers have a tenth of their speed. A
    worker dies or hangs after a time with these means; infinity: never. A line that `kills` kills the engine.
    """

    n_workers: int
    n_parallel: int = 4
    seconds: float = 0.4
    spread: float = 0.7
    speed_spread: float = 0.3
    n_slow: int = 0
    seconds_to_death: float = math.inf
    seconds_to_hang: float = math.inf
    more_seconds: float = 0.0
    kills: Callable[[Line], bool] = lambda line: False
    record: Callable[[Line], bytes] = record


@dataclass(slots=True)
class _Worker:
    name: str
    speed: float
    slots: list[float]
    running: list[tuple[float, int, Item]] = field(default_factory=list)
    n_tokens: int = 0
    progress: int = 0
    hangs_at: float = math.inf
    works: bool = False


class SimulatedCluster:
    """Implements `Cluster`. `clock` is the simulated time. `speed` is the sum of the first workers' speeds.

    `n_lines` counts the lines that were given to workers, `n_deaths` the workers that died.
    """

    def __init__(self, behaviour: Behaviour, seed: int = 0) -> None:
        self.now = 0.0
        self.n_lines = 0
        self.n_deaths = 0
        self._behaviour = behaviour
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._workers: dict[str, _Worker] = {}
        # The time, a number that makes entries unequal, and what happens then.
        self._events: list[tuple[float, int, Callable[[], Event | None]]] = []
        for number in range(behaviour.n_workers):
            self._start(0.0, slow=number < behaviour.n_slow)
        self.speed = sum(worker.speed for worker in self._workers.values())

    def clock(self) -> float:
        """Return the simulated time."""
        return self.now

    @property
    def n_starting(self) -> int:
        """See Cluster."""
        return sum(not worker.works for worker in self._workers.values())

    def add_worker(self) -> None:
        """Start another worker."""
        self._start(0.0)

    def poll(self, seconds: float) -> Sequence[Event]:
        """See Cluster. Returns what happens at the next moment with events, without waiting for it."""
        events: list[Event] = []
        deadline = self.now + seconds
        while self._events and not events and self._events[0][0] <= deadline:
            self.now, _, happen = heapq.heappop(self._events)
            event = happen()
            if event is not None:
                events.append(event)
        if not events:
            self.now = deadline
        return events

    def give(self, worker: str, items: Sequence[Item]) -> None:
        """See Cluster."""
        state, behaviour = self._workers[worker], self._behaviour
        self.n_lines += len(items)
        for item in items:
            spread = math.exp(self._random.gauss(0, behaviour.spread) - behaviour.spread**2 / 2)
            begin = max(self.now, heapq.heappop(state.slots))
            end = begin + behaviour.seconds * spread / state.speed
            heapq.heappush(state.slots, end)
            heapq.heappush(state.running, (end, next(self._numbers), item))
        # As `Worker.work`: some time after the first line is answered, or when half of the lines are.
        ends = heapq.nsmallest(max(1, len(state.running) - behaviour.n_parallel), state.running)
        first, half = (ends[0][0], ends[-1][0]) if ends else (math.inf, math.inf)
        when = min(max(self.now, min(first + behaviour.more_seconds, half)), self.now + _HEARTBEAT_SECONDS)
        if when < state.hangs_at:
            self._at(when, lambda: self._report(state))

    def reload(self, worker: str) -> None:
        """See Cluster."""
        state = self._workers[worker]
        state.works = False
        state.running.clear()
        state.slots = [0.0] * self._behaviour.n_parallel
        self._at(self.now + _START_SECONDS, lambda: self._join(state))

    def discard(self, worker: str, *, for_good: bool) -> None:
        """See Cluster."""
        del self._workers[worker]
        if not for_good:
            self._start(_START_SECONDS)

    def close(self) -> None:
        """See Cluster."""
        self._workers.clear()

    def _at(self, when: float, happen: Callable[[], Event | None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happen))

    def _start(self, seconds: float, *, slow: bool = False) -> None:
        speed = math.exp(self._random.gauss(0, self._behaviour.speed_spread)) / (10 if slow else 1)
        worker = _Worker(f"worker-{next(self._numbers)}", speed, [0.0] * self._behaviour.n_parallel)
        self._workers[worker.name] = worker
        self._at(self.now + seconds, lambda: self._join(worker))

    def _join(self, worker: _Worker) -> Event | None:
        if worker.name not in self._workers:
            return None
        worker.works = True
        if not math.isinf(self._behaviour.seconds_to_death):
            life = self._random.expovariate(1 / self._behaviour.seconds_to_death)
            self._at(self.now + life, lambda: self._die(worker))
        if not math.isinf(self._behaviour.seconds_to_hang):
            worker.hangs_at = self.now + self._random.expovariate(1 / self._behaviour.seconds_to_hang)
        return Joined(worker.name, "simulated", INFO, 2 * self._behaviour.n_parallel)

    def _die(self, worker: _Worker) -> Event | None:
        if self._workers.get(worker.name) is not worker or not worker.works:
            return None
        self.n_deaths += 1
        self.discard(worker.name, for_good=False)
        return Lost(worker.name, "simulated", "its process has ended")

    def _report(self, worker: _Worker) -> Event | None:
        if self._workers.get(worker.name) is not worker or not worker.works:
            return None
        answers = []
        crash = None
        while worker.running and worker.running[0][0] <= self.now and crash is None:
            _, _, item = heapq.heappop(worker.running)
            if self._behaviour.kills(item.line):
                crash = CRASH
            else:
                answers.append(Answer(item.task, self._behaviour.record(item.line), "", 50, 0, 40))
        worker.n_tokens += 40 * len(answers)
        worker.progress += 1
        return Reported(worker.name, Report(answers, crash, worker.n_tokens, worker.progress))
