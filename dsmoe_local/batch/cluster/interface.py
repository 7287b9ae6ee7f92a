"""The interface between the run of a batch and the workers that answer its lines, and the data they exchange.

`ray_cluster` implements it with Ray, tests and `benchmarks/ray_batches.py` without processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.batch.lines import Line
from dsmoe_local.engine.types import ModelInfo


@dataclass(frozen=True, slots=True)
class Item:
    """A line for a worker."""

    task: int
    line: Line


@dataclass(frozen=True, slots=True)
class Answer:
    """The record of a task, and the tokens of its reply. `failure` is that of the record."""

    task: int
    content: bytes
    failure: str
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker has done since its last report.

    `crash` is the reason why its engine ended, and with it all unanswered lines of the worker. `n_tokens`
    counts all generated tokens, those of unfinished replies too. `progress` changes with every step of the
    engine.
    """

    answers: Sequence[Answer] = ()
    crash: DsmoeError | None = None
    n_tokens: int = 0
    progress: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker has loaded the model and waits for `Cluster.give`. `capacity`: the lines it should have."""

    worker: str
    node: str
    info: ModelInfo
    capacity: int


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker has reported. It waits for `Cluster.give`, or for `Cluster.reload` after a crash."""

    worker: str
    report: Report


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker was lost, or could not start. If possible, the cluster starts another one in its place."""

    worker: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker cannot load the model, for example because its node does not have it. It is not replaced."""

    worker: str
    node: str
    error: DsmoeError


Event: TypeAlias = Joined | Reported | Lost | Refused


class Cluster(Protocol):
    """Workers that answer lines."""

    @property
    def n_starting(self) -> int:
        """The workers that start, load the model or wait for their place."""
        ...

    def poll(self, seconds: float) -> Sequence[Event]:
        """Return what has happened; wait up to `seconds` for the first event. Start workers if some are
        missing. Raises DsmoeError if there is no worker, and none can be started.
        """
        ...

    def give(self, worker: str, items: Sequence[Item]) -> None:
        """Give lines, if any, to a worker that waits. It reports when one is answered, or after a while."""
        ...

    def reload(self, worker: str) -> None:
        """Let a worker whose engine has crashed load the model again. It then joins again."""
        ...

    def discard(self, worker: str, *, for_good: bool) -> None:
        """Kill a worker. Start another one in its place, unless its node must not be used, `for_good`.

        There are no more events about it.
        """
        ...

    def close(self) -> None:
        """Kill all workers."""
        ...
