"""The one model file that probes are tried in. From probe to probe, only the groups that change are written.

llama.cpp refuses a gap between two tensors, so a group that becomes smaller cannot stay in its place. It goes
to the end of the file, and the group that was there before takes its place: groups of equal size just swap.
Of each size, one group lies at the end from the start, the largest first. A probe thus writes its own group,
the group before it, and at most one group of each smaller size.

Weights always come from the source, never from the file itself. The file is of no use to a later run: it is
neither synced nor resumed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from dsmoe_local.base.durable import require_space
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_writer import plan_gguf, write_at
from dsmoe_quantize.quantize import Plan, jobs_of, opened, refuse_another
from dsmoe_quantize.write.encoder import TensorJob, check_job
from dsmoe_quantize.write.output import disk_errors
from dsmoe_quantize.write.pipeline import Effects, encode_all, n_cores

Group = Sequence[str]
"""Names of tensors, in the source's order."""


def changed_by(plan: Plan) -> Group:
    """The tensors that get another type."""
    return [choice.name for choice in plan.choices if choice.changes]


def size_of(file: GgufFile, group: Group) -> tuple[int, ...]:
    """Sorts groups: bytes of the group, then of each tensor. Groups of the same size can swap places."""
    sizes = [-(-file.tensors[name].n_bytes // file.alignment) * file.alignment for name in group]
    return (sum(sizes), *sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors in file order; those of `last` are at the end."""

    order: Sequence[str]
    last: Group = ()

    @classmethod
    def of(cls, file: GgufFile, groups: Iterable[Group]) -> Layout:
        """For groups that are probed in this order, ascending by size: the first of each size at the end."""
        firsts: dict[tuple[int, ...], Group] = {}
        for group in groups:
            firsts.setdefault(size_of(file, group), group)
        ending = dict.fromkeys(name for group in reversed(firsts.values()) for name in group)
        return cls([*(name for name in file.tensors if name not in ending), *ending])

    def ending_in(self, file: GgufFile, group: Group) -> Layout:
        """The layout with `group` at the end. What was there takes its place if it fits exactly."""
        back = [name for name in self.last if name not in group]
        out = [name for name in group if name not in self.last]
        order = [name for name in self.order if name not in self.last]
        if size_of(file, back) == size_of(file, out):
            places = dict(zip(out, back, strict=True))
            order = [places.get(name, name) for name in order]
        else:
            order = [*(name for name in order if name not in out), *back]
        return Layout([*order, *group], group)


class ProbeFile:
    """The file at `path`, made by the first `write`. Use as a context. Nobody may have the file open as a
    model while it is written: an engine maps it.
    """

    def __init__(self, path: Path, source: GgufFile, groups: Iterable[Group], threads: int = 0) -> None:
        self.path = path
        self._source = source
        self._threads = threads or n_cores()
        self._layout = Layout.of(source, groups)
        self._held: dict[str, tuple[int, GgmlType]] = {}
        self._descriptor = -1

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)

    def write(self, plan: Plan, listen: Listener, stop: threading.Event) -> None:
        """Make the file what `plan` says. Raises NoSpaceError, FileError, WeightError, InterruptedRunError;
        after an error the next call writes everything.
        """
        for text in plan.notes:
            listen(Note(text))
        layout = self._layout.ending_in(self._source, changed_by(plan))
        with opened(plan.file) as source, disk_errors(self.path):
            jobs = {job.name: job for job in jobs_of(plan, source)}
            # The source's own metadata: a header of the same length keeps all tensors where they are.
            gguf = plan_gguf(plan.file.metadata, [jobs[name] for name in layout.order])
            wanted = {name: (gguf.offsets[name], jobs[name].type) for name in layout.order}
            missing = [jobs[name] for name in layout.order if self._held.get(name) != wanted[name]]
            self._held = {}
            require_space(self.path.parent, gguf.size - os.fstat(self._descriptor).st_size)
            write_at(self._descriptor, gguf.header, 0)
            self._encode(missing, gguf.offsets, listen, stop)
            os.ftruncate(self._descriptor, gguf.size)
            refuse_another(plan.file, source)
        self._layout, self._held = layout, wanted

    def _encode(
        self,
        jobs: Sequence[TensorJob],
        offsets: Mapping[str, int],
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        for job in jobs:
            check_job(job)
        listening = threading.Lock()

        def advanced(job: TensorJob, n_bytes: int) -> None:
            with listening:
                listen(Advanced(n_bytes, job.name))

        effects = Effects(
            lambda data, offset: write_at(self._descriptor, data.data, offset), advanced, lambda _: None
        )
        listen(Started("encoding", sum(job.n_bytes for job in jobs)))
        encode_all(jobs, offsets, effects, self._threads, stop)
        if stop.is_set():
            raise InterruptedRunError("interrupted while encoding")
        listen(Finished("encoding"))
