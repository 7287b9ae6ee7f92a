"""A cluster of Ray actors, each of which is a worker."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from typing import Any

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.progress import Finished, Listener, Note, Started
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.batch.cluster.interface import (
    Event,
    Fault,
    Item,
    Joined,
    Lost,
    Refused,
    Report,
    Reported,
)
from dsmoe_local.batch.cluster.ray_connection import AUTO, LOCAL, connect, import_ray
from dsmoe_local.batch.cluster.worker import Loaded, LoadLater, NoModel, Worker, WorkerOptions
from dsmoe_local.model.gguf_split import read_parts

_CHUNK = 16 << 20  # of a model that is copied
_NODES_SECONDS = 2.0  # between looks for new nodes
_NODE_SECONDS = 60.0  # the wait for a new node when the last worker was lost
_COPY_SECONDS = 2.0  # between looks for a model that another worker or run copies
_HEARTBEAT_SECONDS = 1.0
_CALL_SECONDS = 0.002  # what a report costs here: workers wait so long for more answers, times their number
_MAX_WAIT_SECONDS = 2.0
_MAX_DEATHS = 3  # of a node's workers before they have loaded the model
_NODE_DIED = re.compile(r"because (its|the) node")
_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where the cluster is, and what its workers get.

    `address` is LOCAL, AUTO or HOST:PORT. `n_workers` None: as many as have room. `n_cpus`, `n_gpus` and
    `memory` (bytes) are reserved for each worker; None: an equal part of the node, and no memory.
    `ship_model`: nodes without the model get a copy.
    """

    address: str = AUTO
    n_workers: int | None = None
    n_cpus: int | None = None
    n_gpus: int | None = None
    memory: int | None = None
    ship_model: bool = False


class _Stage(Enum):
    LOADING = auto()
    COPYING = auto()
    WAITING = auto()  # for a copy of the model by another worker or run
    WORKING = auto()


@dataclass(slots=True, eq=False)
class _Member:
    """An actor. `call` is its unfinished call; `copy` yields the calls that copy the model to its node.

    `load_at`: when to load again, while another worker or run copies the model.
    """

    name: str
    node: _Node
    actor: Any
    stage: _Stage = _Stage.LOADING
    call: Any = None
    copy: Iterator[Any] | None = None
    load_at: float = math.inf


@dataclass(frozen=True, slots=True)
class _Node:
    """A node with its total resources."""

    id: str
    name: str
    n_cpus: int
    n_gpus: int
    memory: int


class RayCluster:
    """Starts workers on all nodes that have room for them, also on nodes that are added later."""

    def __init__(
        self, options: RayOptions, worker: WorkerOptions, listen: Listener, stop: threading.Event
    ) -> None:
        """Connect to the cluster. Raises DsmoeError; MissingExtraError without Ray; InterruptedRunError."""
        self._options = options
        self._worker = worker
        self._listen = listen
        self._ray = import_ray(options.address)
        self._closed = threading.Event()
        stage = "starting Ray" if options.address == LOCAL else "connecting to Ray"
        listen(Started(stage, 1, unit="clusters"))
        try:
            connect(self._ray, options.address, stop, self._closed)
        except BaseException:
            self._closed.set()
            raise
        listen(Finished(stage))
        # A copy of the options in the object store, for all workers.
        self._shared = self._ray.put(worker)
        self._n_started = 0
        self._noted = False
        self._members: dict[str, _Member] = {}
        self._events: list[Event] = []
        self._n_most: dict[str, int] = {}  # workers that a node can have, if less than have room
        self._deaths: Counter[str] = Counter()
        self._looked = -math.inf
        self._refused: Refused | None = None  # the last node
        self._empty_since: float | None = None  # when it was found that there are no workers

    @property
    def n_starting(self) -> int:
        """See Cluster."""
        return sum(member.stage is not _Stage.WORKING for member in self._members.values())

    def poll(self, seconds: float) -> Sequence[Event]:
        """See Cluster."""
        self._start_workers()
        for member in self._members.values():
            if member.load_at < time.monotonic():
                self._load(member)
        calls = {member.call: member for member in self._members.values() if member.call is not None}
        if calls:
            ready, _ = self._ray.wait(list(calls), timeout=0 if self._events else seconds)
            if ready and len(calls) > 1:
                ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in ready:
                # Another event may have removed it.
                if calls[call].name in self._members:
                    self._settle(calls[call])
        elif not self._events:
            time.sleep(seconds)
        events, self._events = self._events, []
        return events

    def give(self, worker: str, items: Sequence[Item]) -> None:
        """See Cluster."""
        member, n_workers = self._members[worker], len(self._members)
        more_seconds = min(_MAX_WAIT_SECONDS, n_workers * _CALL_SECONDS)
        member.call = member.actor.work.remote(items, _HEARTBEAT_SECONDS + more_seconds, more_seconds)

    def reload(self, worker: str) -> None:
        """See Cluster."""
        self._load(self._members[worker])

    def discard(self, worker: str, *, for_good: bool) -> None:
        """See Cluster."""
        member = self._members[worker]
        self._remove(member)
        if for_good:
            self._n_most[member.node.id] = self._n_workers(member.node)

    def close(self) -> None:
        """See Cluster."""
        for member in list(self._members.values()):
            self._remove(member)
        self._ray.shutdown()
        self._closed.set()

    # Starting workers.

    def _start_workers(self) -> None:
        """Start the workers that are missing."""
        now = time.monotonic()
        if now - self._looked < _NODES_SECONDS:
            return
        self._looked = now
        nodes = [_node(found) for found in self._ray.nodes() if found["Alive"]]
        n_wanted = self._options.n_workers
        each = 1 if n_wanted is None else -(-n_wanted // max(1, len(nodes)))
        n_workers = Counter(member.node.id for member in self._members.values())
        room = {node.id: self._room(node, each) for node in nodes}
        while n_wanted is None or len(self._members) < n_wanted:
            free = [node for node in nodes if n_workers[node.id] < room[node.id]]
            if not free:
                self._note_few_workers()
                break
            node = min(free, key=lambda node: n_workers[node.id])
            self._start(node, each)
            n_workers[node.id] += 1
        self._check_workers(nodes, now)

    def _note_few_workers(self) -> None:
        """Tell the user once if fewer workers have room than were asked for."""
        n_wanted, n_workers = self._options.n_workers, len(self._members)
        if n_wanted and n_workers and not self._noted:
            self._noted = True
            self._listen(
                Note(
                    f"only {n_workers} of {n_wanted} workers have room; others start on nodes that are added"
                )
            )

    def _check_workers(self, nodes: Sequence[_Node], now: float) -> None:
        """Raise DsmoeError if there is no worker, and a new node would not help or did not come."""
        if self._members:
            self._empty_since = None
            return
        if self._refused is not None:
            fault = self._refused.fault
            raise DsmoeError(f"{self._refused.node}: {fault.what}", where=fault.where, remedy=fault.remedy)
        self._empty_since = self._empty_since or now
        if not self._n_started or now - self._empty_since > _NODE_SECONDS:
            raise self._no_room(nodes)

    def _n_workers(self, node: _Node) -> int:
        return sum(member.node.id == node.id for member in self._members.values())

    def _needs(self, node: _Node, each: int) -> dict[str, int]:
        """Return what Ray reserves for a worker on a node that has `each` of them."""
        options = self._options
        n_cpus = options.n_cpus or max(1, node.n_cpus // each)
        n_gpus = node.n_gpus // max(1, node.n_cpus // n_cpus) if options.n_gpus is None else options.n_gpus
        return {"num_cpus": n_cpus, "num_gpus": n_gpus, "memory": options.memory or 0}

    def _room(self, node: _Node, each: int) -> int:
        """Return how many workers a node can have."""
        needs = self._needs(node, each)
        has = {"num_cpus": node.n_cpus, "num_gpus": node.n_gpus, "memory": node.memory}
        room = min(has[name] // needed for name, needed in needs.items() if needed)
        return min(room, self._n_most.get(node.id, room))

    def _no_room(self, nodes: Sequence[_Node]) -> DsmoeError:
        largest = max(nodes, key=lambda node: (node.n_gpus, node.n_cpus), default=None)
        where = count(len(nodes), "node")
        if largest is not None:
            where += (
                f"; {largest.name} has {count(largest.n_cpus, 'CPU')}, {count(largest.n_gpus, 'GPU')},"
                f" {format_size(largest.memory)}"
            )
        return DsmoeError(
            "no node of the cluster has room for a worker",
            where=where,
            remedy="ask for less: -t (CPUs), --ray-gpus, --ray-memory",
        )

    def _start(self, node: _Node, each: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        needs = self._needs(node, each)
        actor = (
            self._ray.remote(Worker)
            .options(**needs, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(self._shared, needs["num_cpus"])
        )
        self._n_started += 1
        member = _Member(f"worker-{self._n_started}", node, actor)
        self._members[member.name] = member
        self._load(member)

    def _load(self, member: _Member) -> None:
        member.stage, member.call = _Stage.LOADING, member.actor.load.remote()
        member.load_at = math.inf

    def _load_later(self, member: _Member) -> None:
        member.stage, member.load_at = _Stage.WAITING, time.monotonic() + _COPY_SECONDS

    # What calls return.

    def _settle(self, member: _Member) -> None:
        """Handle the end of a member's call."""
        call, member.call = member.call, None
        try:
            value = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._lose(member, error)
            return
        if isinstance(value, Report):
            self._events.append(Reported(member.name, value))
        elif isinstance(value, Loaded):
            member.stage = _Stage.WORKING
            self._deaths.pop(member.node.id, None)
            self._events.append(Joined(member.name, member.node.name, value.info, value.capacity))
        elif isinstance(value, NoModel) and self._options.ship_model:
            self._copy_model(member)
        elif isinstance(value, NoModel):
            self._refuse(member, value.fault)
            self._n_most[member.node.id] = 0
        elif isinstance(value, LoadLater):
            self._load_later(member)
        elif isinstance(value, Fault):
            self._refuse(member, value)
        else:
            self._continue_copy(member)

    def _refuse(self, member: _Member, fault: Fault) -> None:
        self._remove(member)
        self._n_most[member.node.id] = self._n_workers(member.node)
        self._refused = Refused(member.name, member.node.name, fault)
        self._events.append(self._refused)

    def _lose(self, member: _Member, error: Exception) -> None:
        self._deaths[member.node.id] += member.stage is not _Stage.WORKING
        reason = _reason(error)
        if self._deaths[member.node.id] >= _MAX_DEATHS:
            self._refuse(member, Fault("worker_lost_error", "worker_lost_error", reason))
        else:
            self._remove(member)
            self._events.append(Lost(member.name, member.node.name, reason))

    def _remove(self, member: _Member) -> None:
        """Kill an actor. Its engine's process ends with it."""
        self._members.pop(member.name, None)
        self._looked = -math.inf  # another one may have room now
        self._ray.kill(member.actor)

    # Copies of the model.

    def _copy_model(self, member: _Member) -> None:
        """Copy the model to a member's node, or let the member wait for the copy that another one gets."""
        others = [other for other in self._members.values() if other.node.id == member.node.id]
        if any(other.stage is _Stage.COPYING for other in others):
            self._load_later(member)
            return
        member.stage, member.copy = _Stage.COPYING, self._copy_calls(member.actor, member.node.name)
        self._continue_copy(member)

    def _copy_calls(self, actor: Any, node: str) -> Iterator[Any]:  # noqa: ANN401 - an actor of Ray
        """Yield the calls that copy the model to an actor's node. Each must have ended before the next."""
        path = self._worker.model.path
        files = [part.path for part in read_parts(path).parts]
        n_bytes = sum(file.stat().st_size for file in files)
        digest = blake2b()
        yield actor.begin_copy.remote(n_bytes)
        self._listen(Note(f"copying {path.name} ({format_size(n_bytes)}) to {node}"))
        for each in files:
            with each.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    yield actor.write_copy.remote(each.name, chunk)
        yield actor.finish_copy.remote(digest.hexdigest())

    def _continue_copy(self, member: _Member) -> None:
        assert member.copy is not None
        member.call = next(member.copy, None)
        if member.call is None:
            self._load(member)


def _node(found: dict[str, Any]) -> _Node:
    """Return a node as `ray.nodes()` describes it."""
    resources = found["Resources"]
    name = f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']}, node {found['NodeID'][:6]})"
    return _Node(
        found["NodeID"],
        safe_line(name, 80),
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        int(resources.get("memory", 0)),
    )


def _reason(error: Exception) -> str:
    """Return in words why an actor was lost."""
    text = str(error)
    if missing := _MISSING_MODULE.search(text):
        return f"the package {missing[1].partition('.')[0]} is not installed there"
    if _NODE_DIED.search(text):
        return "its node has gone"
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {safe_line(str(cause), 120)}" if cause else "its process has ended"
