"""A thread that puts records on the disk in groups: while one group is synced, the next one gathers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from dsmoe_local.batch.journal import Output, Record

_MOST_IN_GROUP = 256


class RecordWriter:
    """Appends what it is given. `acknowledge` is called in its thread, with the records that now count; or
    with the error that ended the work.
    """

    def __init__(
        self, output: Output, acknowledge: Callable[[Sequence[Record] | BaseException], None]
    ) -> None:
        self._output = output
        self._acknowledge = acknowledge
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dsmoe-batch-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Hand over a record."""
        self._queue.put(record)

    def close(self) -> None:
        """Write what was handed over, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while group := self._next_group():
                self._output.append(group)
                self._acknowledge(group)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that runs the batch
            self._acknowledge(error)

    def _next_group(self) -> list[Record]:
        group: list[Record] = []
        while len(group) < _MOST_IN_GROUP:
            try:
                record = self._queue.get(block=not group)
            except queue.Empty:
                break
            if record is None:
                # Put back for the next call: this group is written first.
                self._queue.put(None)
                break
            group.append(record)
        return group
