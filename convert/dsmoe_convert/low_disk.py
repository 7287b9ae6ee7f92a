"""Read shards that are downloaded one at a time and deleted when no tensor needs them any more.

A shard is kept until all tensors made from it are synced and journaled: after a crash, the next run finds
either the shard or those tensors. Two shards are on disk at a time: one is downloaded while another one is
encoded. Shards are downloaded in the order in which tensors need them, so readers cannot deadlock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.shards import StoredTensor, read_span
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.text import safe_line

N_SHARDS = 2
"""Shards on disk at a time, unless one tensor needs more."""
_POLL = 0.2  # seconds between checks of the stop event

Fetch = Callable[[str], tuple[Path, Mapping[str, StoredTensor]]]
"""Downloads a shard. Returns its path and its tensors, by its own header."""


class ShardWindow:
    """A ShardSource over shards that `fetch` downloads one at a time."""

    def __init__(self, fetch: Fetch, stop: threading.Event) -> None:
        self._fetch = fetch
        self._stop = stop
        self._changed = threading.Condition()
        self._sequence: list[str] = []
        self.n_shards = N_SHARDS
        self._needed_by: dict[str, set[str]] = {}
        self._present: dict[str, _Shard] = {}
        self._error: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def arrange(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> Sequence[str]:
        """See ShardSource. Tensors are sorted by last and first shard, so that shards are used in turn."""

        def key(name: str) -> tuple[str, str]:
            shards = [tensor.shard for tensor in wanted[name]]
            return max(shards), min(shards)

        order = sorted(wanted, key=key)
        needs = [sorted({tensor.shard for tensor in wanted[name]}) for name in order]
        for name, shards in zip(order, needs, strict=True):
            for shard in shards:
                self._needed_by.setdefault(shard, set()).add(name)
        self._sequence = list(dict.fromkeys(shard for shards in needs for shard in shards))
        self.n_shards = max(N_SHARDS, _most_at_once(needs))
        self._thread = threading.Thread(target=self._download_all, name="shards", daemon=True)
        self._thread.start()
        return order

    @property
    def sequence(self) -> Sequence[str]:
        """The shards in the order of download, after `arrange`."""
        return self._sequence

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """See ShardSource. Waits until the shard is downloaded."""
        try:
            self._read_into(tensor, start, buffer)
        except BaseException as error:
            # The shard will never be released: wake the readers that wait for a later one.
            self._fail(error)
            raise

    def _read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        with self._changed:
            while tensor.shard not in self._present:
                if self._error:
                    raise self._error
                if self._stop.is_set() or self._closing:
                    raise InterruptedRunError("interrupted", remedy="run the same command again to continue")
                self._changed.wait(_POLL)
            shard = self._present[tensor.shard]
        actual = shard.tensors.get(tensor.name)
        if actual is None or (actual.dtype, actual.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                "the shard has another header than before its download",
                where=f"{safe_line(tensor.shard, 60)}: {safe_line(tensor.name, 60)}",
                remedy="the repository may have changed: run the command again",
            )
        read_span(shard.descriptor, shard.path, actual.offset + start, buffer)

    def release(self, names: Sequence[str]) -> None:
        """See ShardSource. Shards that no other tensor needs are deleted."""
        with self._changed:
            for shard, needed_by in list(self._needed_by.items()):
                needed_by.difference_update(names)
                if not needed_by:
                    del self._needed_by[shard]
                    reach("shards.spent")
                    self._present.pop(shard).delete()
            self._changed.notify_all()

    def close(self) -> None:
        """See ShardSource. Shards stay on disk for the next run."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            # Do not wait for a download in progress: the thread ends with the process.
            self._thread.join(_POLL)
        with self._changed:
            for shard in self._present.values():
                os.close(shard.descriptor)
            self._present.clear()

    def _download_all(self) -> None:
        """Download all shards, each when there is room for it. The body of the thread."""
        try:
            for name in self._sequence:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or len(self._present) < self.n_shards)
                    if self._closing:
                        return
                path, tensors = self._fetch(name)
                shard = _Shard(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), tensors)
                with self._changed:
                    if self._closing:
                        os.close(shard.descriptor)
                        return
                    self._present[name] = shard
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the readers raise it in their threads
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class _Shard:
    """An open shard on disk."""

    def __init__(self, path: Path, descriptor: int, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.descriptor = descriptor
        self.tensors = tensors

    def delete(self) -> None:
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)


def _most_at_once(needs: Sequence[Sequence[str]]) -> int:
    """Return the largest number of shards needed at once. `needs` has the shards of each tensor, in order."""
    last = {shard: at for at, shards in enumerate(needs) for shard in shards}
    most, here = 0, set[str]()
    for at, shards in enumerate(needs):
        here |= set(shards)
        most = max(most, len(here))
        here = {shard for shard in here if last[shard] > at}
    return most
