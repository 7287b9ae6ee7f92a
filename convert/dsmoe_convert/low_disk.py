"""Shards that are not here yet: each is fetched when its turn comes, and deleted once nothing needs it.

A shard is needed until everything that is made of it is synced and journaled: whatever kills the run, the
next one finds either the shard or what was made of it. At most two shards lie on disk, so that the next one
arrives while one is encoded. Which comes when follows from the order in which tensors are encoded, so every
wait ends: the shards of a tensor come before those of the next, and go when no later tensor needs them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.shards import read_span
from dsmoe_convert.stored import StoredTensor
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.text import safe_line

N_SHARDS = 2
"""Shards on disk together, unless one tensor needs more."""
_POLL = 0.2  # seconds between looks at the stop event while waiting

Fetch = Callable[[str], tuple[Path, Mapping[str, StoredTensor]]]
"""Bring one shard: its path, and its tensors as its own header tells them."""


class ShardWindow:
    """A ShardSource over shards that `fetch` brings one at a time."""

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
        """See ShardSource: by last and first shard, so that shards are done with one after another."""

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
        self._thread = threading.Thread(target=self._bring_all, name="shards", daemon=True)
        self._thread.start()
        return order

    @property
    def sequence(self) -> Sequence[str]:
        """The shards in the order in which they will be fetched; known after `arrange`."""
        return self._sequence

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """See ShardSource; waits until the shard is here."""
        try:
            self._read_into(tensor, start, buffer)
        except BaseException as error:
            # Its shard will never be done with: those who wait for a later one must not wait for that.
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
                "the shard is not what its header said before it was downloaded",
                where=f"{safe_line(tensor.shard, 60)}: {safe_line(tensor.name, 60)}",
            )
        read_span(shard.descriptor, shard.path, actual.offset + start, buffer)

    def release(self, names: Sequence[str]) -> None:
        """See ShardSource; a shard that only these needed is deleted."""
        with self._changed:
            for shard, needed_by in list(self._needed_by.items()):
                needed_by.difference_update(names)
                if not needed_by:
                    del self._needed_by[shard]
                    reach("shards.spent")
                    self._present.pop(shard).delete()
            self._changed.notify_all()

    def close(self) -> None:
        """See ShardSource. Shards that are still here stay on disk for the next run."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            # A download in progress is not waited for: the thread ends with the process.
            self._thread.join(_POLL)
        with self._changed:
            for shard in self._present.values():
                os.close(shard.descriptor)
            self._present.clear()

    def _bring_all(self) -> None:
        """The body of the fetching thread."""
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
    """A shard on disk, open."""

    def __init__(self, path: Path, descriptor: int, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.descriptor = descriptor
        self.tensors = tensors

    def delete(self) -> None:
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)


def _most_at_once(needs: Sequence[Sequence[str]]) -> int:
    """How many shards must lie on disk at the worst moment; `needs` holds those of each tensor, in order."""
    last = {shard: at for at, shards in enumerate(needs) for shard in shards}
    most, here = 0, set[str]()
    for at, shards in enumerate(needs):
        here |= set(shards)
        most = max(most, len(here))
        here = {shard for shard in here if last[shard] > at}
    return most
