"""Threads that read, encode and write slabs of many tensors, and one that syncs finished tensors.

It knows neither paths nor formats. There are more workers than encoders, so that some read and write while
all cores encode.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsmoe_local.base import durable
from dsmoe_local.base.faults import reach
from dsmoe_quantize.write.encoder import Bytes, Slab, SlabEncoder, TensorJob, slabs

SYNC_BYTES = 128 << 20
"""Finished bytes that trigger a sync. At most twice as many wait for one: that bounds what a crash can lose,
how much the last sync writes, and how long an interruption takes.
"""
SYNC_SECONDS = 1.0
"""The longest time that a finished tensor waits for a sync."""

Journaled: TypeAlias = Callable[[Sequence[str]], object]
"""Called with the names of tensors that are synced and in the journal."""


@dataclass(frozen=True, slots=True)
class Effects:
    """What workers call beside the encoder, from several threads at once.

    `write` writes bytes at an offset. `advanced` is called for each slab written (tensor, bytes), `finished`
    for each tensor whose slabs are all written.
    """

    write: Callable[[Bytes, int], None]
    advanced: Callable[[TensorJob, int], None]
    finished: Callable[[TensorJob], None]


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    jobs: Sequence[TensorJob],
    offsets: Mapping[str, int],
    effects: Effects,
    threads: int,
    stop: threading.Event,
) -> None:
    """Encode all jobs with `threads` encoders and write each tensor at its offset.

    Returns early if `stop` is set. If slabs fail, raises the error of the first one in the order of the jobs,
    once all threads have ended.
    """
    run = _Run(jobs, offsets, effects, threads, stop)
    workers = [
        threading.Thread(target=run.work, name=f"encoder-{number}")
        for number in range(threads + min(threads, 4))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException:
        run.abandon()
        for worker in workers:
            # A thread that was never started cannot be joined. One that starts after this ends at once.
            if worker.is_alive():
                worker.join()
        raise
    run.raise_first()


@dataclass(frozen=True, slots=True)
class _Task:
    order: int
    job: TensorJob
    slab: Slab


class _Run:
    """The state that the workers of one `encode_all` call share."""

    def __init__(
        self,
        jobs: Sequence[TensorJob],
        offsets: Mapping[str, int],
        effects: Effects,
        threads: int,
        stop: threading.Event,
    ) -> None:
        self._offsets = offsets
        self._effects = effects
        self._stop = stop
        self._abandoned = False
        self._lock = threading.Lock()
        self._encoders = threading.BoundedSemaphore(threads)
        self._slabs_left: dict[str, int] = {}
        self._errors: list[tuple[float, BaseException]] = []
        self._tasks = self._all_tasks(jobs)

    def work(self) -> None:
        """The body of a thread: do tasks until none is left."""
        # A failure outside of a slab sorts after those of all slabs.
        order = math.inf
        try:
            encoder = SlabEncoder()
            while (task := self._next()) is not None:
                order = task.order
                self._do(task, encoder)
                order = math.inf
        except BaseException as error:  # noqa: BLE001 - raise_first raises it in the caller's thread
            with self._lock:
                self._errors.append((order, error))

    def abandon(self) -> None:
        """Tell all workers to end soon."""
        self._abandoned = True

    def raise_first(self) -> None:
        """Raise the error of the earliest slab, which is the same in every run: slabs are taken in order."""
        if self._errors:
            raise min(self._errors, key=lambda entry: entry[0])[1]

    def _stopped(self) -> bool:
        return self._abandoned or self._stop.is_set()

    def _all_tasks(self, jobs: Sequence[TensorJob]) -> Iterator[_Task]:
        order = 0
        for job in jobs:
            parts = list(slabs(job))
            self._slabs_left[job.name] = len(parts)
            for slab in parts:
                yield _Task(order, job, slab)
                order += 1

    def _next(self) -> _Task | None:
        with self._lock:
            return None if self._errors or self._stopped() else next(self._tasks, None)

    def _do(self, task: _Task, encoder: SlabEncoder) -> None:
        job, slab = task.job, task.slab
        raw = encoder.read(job, slab)
        with self._encoders:
            encoded = encoder.encode(job, slab, raw, self._stopped)
        if encoded is None:
            return
        row = job.n_bytes // job.n_rows
        self._effects.write(encoded, self._offsets[job.name] + slab.first_row * row)
        reach("output.slab")
        self._effects.advanced(job, encoded.nbytes)
        with self._lock:
            self._slabs_left[job.name] -= 1
            finished = not self._slabs_left[job.name]
        if finished:
            self._effects.finished(job)


class Syncer:
    """A thread that calls `sync` and then journals the tensors that were finished before that.

    It works while others write, so that little is left to sync at the end. `journaled` is called with the
    names. An error ends the thread; `finished` and `close` raise it.
    """

    def __init__(self, sync: Callable[[], object], journal: durable.Journal, journaled: Journaled) -> None:
        self._sync_files = sync
        self._journal = journal
        self._journaled = journaled
        self._waiting: list[str] = []
        self._n_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="syncer")
        self._thread.start()

    def finished(self, job: TensorJob) -> None:
        """Register a tensor that is written; wait while the disk is too far behind."""
        with self._wake:
            self._waiting.append(job.name)
            self._n_bytes += job.n_bytes
            if self._n_bytes >= SYNC_BYTES:
                self._wake.notify_all()
            self._wake.wait_for(lambda: self._error or self._closing or self._n_bytes < 2 * SYNC_BYTES)
            if self._error:
                raise self._error

    def close(self) -> None:
        """Return once all finished tensors are durable."""
        self._end()
        self._sync()
        if self._error:
            raise self._error

    def abandon(self) -> None:
        """End without a last sync. Tensors that still wait for one will be written again."""
        self._end()

    def _end(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while not self._error:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._n_bytes >= SYNC_BYTES, SYNC_SECONDS)
                if self._closing:
                    return
            self._sync()

    def _sync(self) -> None:
        with self._wake:
            names, self._waiting, self._n_bytes = self._waiting, [], 0
            self._wake.notify_all()
        if not names or self._error:
            return
        try:
            self._sync_files()
            reach("output.synced")
            self._journal.append(*names)
            reach("output.journaled")
            self._journaled(names)
        except BaseException as error:  # noqa: BLE001 - `finished` and `close` raise it
            with self._wake:
                self._error = error
                self._wake.notify_all()
