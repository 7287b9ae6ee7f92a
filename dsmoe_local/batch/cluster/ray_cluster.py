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
from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.cluster.interface import (
    Event,
    Item,
    Joined,
    Lost,
    Refused,
    Report,
    Reported,
)
from dsmoe_local.batch.cluster.placement import Node, Placement, RayOptions, no_room, node_of, waiting_note
from dsmoe_local.batch.cluster.ray_connection import LOCAL, connect, import_ray
from dsmoe_local.batch.cluster.worker import Loaded, LoadLater, NoModelError, Worker, WorkerOptions
from dsmoe_local.engine.errors import WorkerLostError
from dsmoe_local.model.gguf_split import read_parts

_CHUNK = 16 << 20  # of a model that is copied
_NODES_SECONDS = 2.0  # between looks for new nodes
_NODE_SECONDS = 60.0  # the wait for a new node when the last worker was lost
_COPY_SECONDS = 2.0  # between looks for a model that another worker or run copies
_START_SECONDS = 20.0  # of a worker's process, until the user is told that it waits for resources
_HEARTBEAT_SECONDS = 1.0
# What a report may cost the driver. Workers wait this long, times their number, for more answers.
# `benchmarks/ray_batches.py --calls` measures 1.2 ms with four actors; it is more with many.
_CALL_SECONDS = 0.002
_MAX_WAIT_SECONDS = 2.0
_MAX_DEATHS = 3  # of a node's workers before they have loaded the model
_NODE_DIED = re.compile(r"because (its|the) node")
_OTHER_VERSION = re.compile(
    r"No module named 'dsmoe_local\.|cannot import name '\w+' from '[\w.]*dsmoe_local|attribute .*dsmoe_local"
)
_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")


class _Stage(Enum):
    STARTING = auto()  # its process, once Ray has the resources
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
    node: Node
    actor: Any
    started: float
    stage: _Stage = _Stage.STARTING
    call: Any = None
    copy: Iterator[Any] | None = None
    load_at: float = math.inf


class RayCluster:
    """A Cluster: workers on all nodes that have room for them, also on nodes that are added later."""

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
        self._noted: set[str] = set()
        self._joined = False  # at least one worker
        self._placement = Placement(options)
        self._members: dict[str, _Member] = {}
        self._events: list[Event] = []
        self._deaths: Counter[str] = Counter()
        self._looked = -math.inf
        self._refused: Refused | None = None  # the last node
        self._empty_since: float | None = None  # when it was found that there are no workers

    @property
    def n_starting(self) -> int:
        return sum(member.stage is not _Stage.WORKING for member in self._members.values())

    def poll(self, seconds: float) -> Sequence[Event]:
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
        member, n_workers = self._members[worker], len(self._members)
        more_seconds = min(_MAX_WAIT_SECONDS, n_workers * _CALL_SECONDS)
        member.call = member.actor.work.remote(items, _HEARTBEAT_SECONDS + more_seconds, more_seconds)

    def reload(self, worker: str) -> None:
        self._load(self._members[worker])

    def discard(self, worker: str, *, for_good: bool) -> None:
        member = self._members[worker]
        self._remove(member)
        if for_good:
            self._placement.limits[member.node.id] = self._n_workers(member.node)

    def close(self) -> None:
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
        nodes = [node_of(found) for found in self._ray.nodes() if found["Alive"]]
        n_workers = Counter(member.node.id for member in self._members.values())
        n_wanted = self._options.n_workers
        for node in self._placement.places(nodes, n_workers):
            if len(self._members) == n_wanted:
                break
            self._start(node)
        self._note_few_workers(now)
        self._check_workers(nodes, now)

    def _note_few_workers(self, now: float) -> None:
        """Tell the user, once each, that workers have no room, or wait for resources that others use."""
        n_wanted, n_workers = self._options.n_workers, len(self._members)
        if n_wanted and 0 < n_workers < n_wanted:
            self._note_once(
                "room",
                f"only {n_workers} of {n_wanted} workers have room, see -t, --ray-gpus and --ray-memory;"
                " others start on nodes that are added",
            )
        waiting = [
            member
            for member in self._members.values()
            if member.stage is _Stage.STARTING and now - member.started > _START_SECONDS
        ]
        if waiting:
            needs = self._placement.needs(waiting[0].node)
            self._note_once("busy", waiting_note(len(waiting), needs, self._ray.available_resources()))

    def _note_once(self, kind: str, text: str) -> None:
        if kind not in self._noted:
            self._noted.add(kind)
            self._listen(Note(text))

    def _check_workers(self, nodes: Sequence[Node], now: float) -> None:
        """Raise DsmoeError if there is no worker, and a new node would not help or did not come."""
        if self._members:
            self._empty_since = None
            return
        self._empty_since = self._empty_since or now
        may_come = self._joined or (self._n_started and self._refused is None)
        if may_come and self._options.address != LOCAL and now - self._empty_since < _NODE_SECONDS:
            return
        if self._refused is None:
            raise no_room(nodes)
        error = self._refused.error
        raise DsmoeError(f"{self._refused.node}: {error.what}", where=error.where, remedy=error.remedy)

    def _n_workers(self, node: Node) -> int:
        return sum(member.node.id == node.id for member in self._members.values())

    def _start(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        needs = self._placement.needs(node)
        actor = (
            self._ray.remote(Worker)
            .options(**needs, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(self._shared, needs["num_cpus"], self._placement.expected(node))
        )
        self._n_started += 1
        member = _Member(f"worker-{self._n_started}", node, actor, time.monotonic())
        self._members[member.name] = member
        member.call = actor.__ray_ready__.remote()

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
        if member.stage is _Stage.STARTING:
            self._load(member)
        elif isinstance(value, Report):
            self._events.append(Reported(member.name, value))
        elif isinstance(value, Loaded):
            member.stage, self._joined = _Stage.WORKING, True
            self._deaths.pop(member.node.id, None)
            self._events.append(Joined(member.name, member.node.name, value.info, value.capacity))
        elif isinstance(value, NoModelError) and self._options.ship_model:
            self._copy_model(member)
        elif isinstance(value, NoModelError):
            self._refuse(member, value)
            self._placement.limits[member.node.id] = 0
        elif isinstance(value, LoadLater):
            self._load_later(member)
        elif isinstance(value, DsmoeError):
            self._refuse(member, value)
        else:
            self._continue_copy(member)

    def _refuse(self, member: _Member, error: DsmoeError) -> None:
        self._remove(member)
        self._placement.limits[member.node.id] = self._n_workers(member.node)
        self._refused = Refused(member.name, member.node.name, error)
        self._events.append(self._refused)

    def _lose(self, member: _Member, error: Exception) -> None:
        self._deaths[member.node.id] += member.stage is not _Stage.WORKING
        reason = _reason(error)
        if self._deaths[member.node.id] >= _MAX_DEATHS:
            self._refuse(member, WorkerLostError(reason))
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


def _reason(error: Exception) -> str:
    """Return in words why an actor was lost."""
    text = str(error)
    if _OTHER_VERSION.search(text):
        return "another version of dsmoe-local is installed there; install the same on all nodes"
    if missing := _MISSING_MODULE.search(text):
        return f"the package {missing[1].partition('.')[0]} is not installed there"
    if _NODE_DIED.search(text):
        return "its node has gone"
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {safe_line(str(cause), 120)}" if cause else "its process has ended"
