"""Keeps the weights that every token reads in memory, so that only routed experts are paged.

For models that are larger than the memory. The pages are locked, or touched every second if the system
forbids locking. `prefetch` handles the experts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.mapped_file import MappedFiles, Range, raise_lock_limit, read_speed, whole_pages
from dsmoe_local.engine.load.placement import Placement
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.hyperparameters import ModelOutline
from dsmoe_local.model.layout import Role, is_output, layer_of, role_of

_LOCK_BYTES = 32 << 20  # between checks whether to stop
_TOUCH_SECONDS = 1.0
_PRIORITY = (
    Role.NORM,
    Role.BIAS,
    Role.ROUTER,
    Role.ATTENTION,
    Role.SHARED_EXPERT,
    Role.DENSE_FFN,
    Role.OUTPUT,
)
"""The roles of tensors that every token reads completely, the smallest first. A token reads only one row of
the embedding.
"""


@dataclass(frozen=True, slots=True)
class HostTensors:
    """The tensors in main memory: those that every token reads, by priority, and the routed experts."""

    always: tuple[TensorInfo, ...]
    experts: tuple[TensorInfo, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(tensor.n_bytes for tensor in self.experts)


def host_tensors(tensors: Iterable[TensorInfo], outline: ModelOutline, placement: Placement) -> HostTensors:
    """Return the tensors that `placement` puts in main memory.

    Overrides of the user are ignored, so tensors that they move to a device are kept in memory too.
    """
    # Tensors without a role are those of architectures without a table.
    order: dict[Role | None, int] = {role: index for index, role in enumerate((*_PRIORITY, None))}
    n_host = outline.n_stored_layers + 1 - placement.n_gpu_layers  # the output counts as a layer
    always: list[tuple[int, int, TensorInfo]] = []
    experts: list[TensorInfo] = []
    for tensor in tensors:
        role = role_of(tensor.name)
        layer = layer_of(tensor.name)
        index = outline.n_stored_layers if layer is None else layer
        if role is Role.ROUTED_EXPERT:
            if index < max(n_host, placement.n_cpu_moe):
                experts.append(tensor)
        elif (role in order or is_output(tensor.name, outline)) and index < n_host:
            always.append((order.get(role, len(order)), tensor.offset, tensor))
    return HostTensors(tuple(tensor for *_, tensor in sorted(always)), tuple(experts))


def plan_resident(tensors: Sequence[TensorInfo], budget: int) -> tuple[Range, ...]:
    """Return the pages of these tensors to keep in memory, at most three quarters of `budget` bytes.

    They are in the order of the files. The rest is for experts, which would otherwise be evicted before use.
    """
    left = budget * 3 // 4
    kept: list[Range] = []
    for tensor in tensors:
        pages = whole_pages(tensor.offset, tensor.offset + tensor.n_bytes, tensor.part)
        if pages.size <= left:
            left -= pages.size
            kept.append(pages)
    return _merge(kept)


def _merge(pages: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for one in sorted(pages, key=lambda pages: (pages.part, pages.start)):
        if merged and one.part == merged[-1].part and one.start <= merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(one.end, merged[-1].end))
        else:
            merged.append(one)
    return tuple(merged)


class Resident:
    """Pages that are kept in memory. The engine's thread calls `refresh`."""

    def __init__(
        self,
        paths: Sequence[Path],
        ranges: tuple[Range, ...],
        listen: progress.Listener,
        stop: threading.Event,
    ) -> None:
        """Read the pages, with progress. Raises FileError, and InterruptedRunError if `stop` is set."""
        self.files = MappedFiles(paths)
        self.n_bytes = sum(pages.size for pages in ranges)
        self.n_locked = 0
        self._touched: list[Range] = []
        self._next_touch = 0.0
        listen(progress.Started("reading the weights that every token needs", self.n_bytes))
        try:
            raise_lock_limit()
            for pages in ranges:
                self._keep(pages, listen, stop)
        except BaseException:
            self.close()
            raise
        finally:
            listen(progress.Finished("reading"))

    def _keep(self, pages: Range, listen: progress.Listener, stop: threading.Event) -> None:
        for start in range(pages.start, pages.end, _LOCK_BYTES):
            if stop.is_set():
                raise InterruptedRunError("loading was interrupted")
            piece = Range(start, min(start + _LOCK_BYTES, pages.end), pages.part)
            # If locking fails once, the limit is reached.
            if not self._touched and self.files.lock(piece):
                self.n_locked += piece.size
            else:
                self.files.touch(piece)
                self._touched.append(piece)
            listen(progress.Advanced(piece.size))

    @property
    def mode(self) -> str:
        """How the pages are kept, for the user."""
        if not self._touched:
            return "locked"
        touched = sum(pages.size for pages in self._touched)
        if not self.n_locked:
            return "touched every second, since the system forbids locking"
        return f"{format_size(touched)} of them touched every second, since the system forbids locking more"

    def refresh(self) -> None:
        """Touch the pages that could not be locked, once a second. Called before each step."""
        if not self._touched or time.monotonic() < self._next_touch:
            return
        for pages in self._touched:
            self.files.touch(pages)
        self._next_touch = time.monotonic() + _TOUCH_SECONDS

    def close(self) -> None:
        """Release the pages. May be called twice."""
        self.files.close()


def speed_note(path: Path, tensors: HostTensors, outline: ModelOutline, resident: int, left: int) -> str:
    """Return the note about the bytes that a token reads from disk and the speed limit; "" if it reads none.

    `resident`: bytes kept in memory. `left`: bytes of memory for experts.
    """
    n_bytes = tensors.expert_bytes
    per_token = n_bytes * outline.n_experts_per_token // max(1, outline.n_routed_experts)
    # Assumes that all experts are equally likely.
    paged = per_token * max(0, n_bytes - left) // max(1, n_bytes)
    paged += max(0, sum(tensor.n_bytes for tensor in tensors.always) - resident)
    if not paged:
        return ""
    speed = read_speed(path)
    pace = f": at {format_size(int(speed))}/s that is at most {speed / paged:.2g} tokens/s" if speed else ""
    return f"a token reads about {format_size(paged)} from disk{pace}"
