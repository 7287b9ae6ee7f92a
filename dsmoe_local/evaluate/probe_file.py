"""A model file in which one group of tensors after another is quantized: a probe of its error cost.

From one probe to the next, only tensors that change or move are written. llama.cpp refuses gaps between
tensors, so the quantized group, which is smaller, must be at the end of the file. It swaps places with the
previous group if both have the same size. Initially, one group of each size is at the end, the largest first.
So a probe writes its own group, the previous group, and at most one group of each smaller size.

Weights are always read from the source. The file is temporary: it is neither synced nor resumed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dsmoe_local.base.durable import output_errors, require_space
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.model.ggml import GgmlType, padded
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_writer import plan_gguf, write_at
from dsmoe_quantize.quantize import Plan, jobs_of, opened
from dsmoe_quantize.write.encoder import TensorJob, check_job
from dsmoe_quantize.write.pipeline import Effects, encode_all, n_cores

TensorNames = Sequence[str]
"""The tensors of a group, in the order of the source."""


def changed_by(plan: Plan) -> TensorNames:
    """Return the tensors whose type a plan changes."""
    return [choice.name for choice in plan.choices if choice.changes]


def size_of(file: GgufFile, group: TensorNames) -> tuple[int, ...]:
    """Return the padded size of a group, then of each tensor. Groups with equal results can swap places."""
    sizes = [padded(file.tensors[name].n_bytes, file.alignment) for name in group]
    return (sum(sizes), *sizes)


@dataclass(frozen=True, slots=True)
class TensorOrder:
    """The order of the tensors in the file. `last` are those at the end."""

    names: TensorNames
    last: TensorNames = ()

    @classmethod
    def of(cls, file: GgufFile, groups: Iterable[TensorNames]) -> TensorOrder:
        """Return the order for groups that are probed one after another, sorted by size."""
        firsts: dict[tuple[int, ...], TensorNames] = {}
        for group in groups:
            firsts.setdefault(size_of(file, group), group)
        ending = dict.fromkeys(name for group in reversed(firsts.values()) for name in group)
        return cls([*(name for name in file.tensors if name not in ending), *ending])

    def ending_in(self, file: GgufFile, group: TensorNames) -> TensorOrder:
        """Return the order with `group` at the end, in exchange for the last group if sizes are equal."""
        back = [name for name in self.last if name not in group]
        out = [name for name in group if name not in self.last]
        names = [name for name in self.names if name not in self.last]
        if size_of(file, back) == size_of(file, out):
            places = dict(zip(out, back, strict=True))
            names = [places.get(name, name) for name in names]
        else:
            names = [*(name for name in names if name not in out), *back]
        return TensorOrder([*names, *group], group)


class ProbeFile:
    """The file at `path`, as a context manager that removes it at the end.

    No engine may have it loaded while it is written, since an engine maps it.
    """

    def __init__(self, path: Path, source: GgufFile, groups: Iterable[TensorNames], threads: int = 0) -> None:
        self.path = path
        self._source = source
        self._threads = threads or n_cores()
        self._order = TensorOrder.of(source, groups)
        self._held: dict[str, tuple[int, GgmlType]] = {}
        self._descriptor = -1

    def __enter__(self) -> Self:
        with output_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)

    def write(self, plan: Plan, listen: Listener, stop: threading.Event) -> None:
        """Write the model of a plan. After an error the next call writes everything.

        Raises NoSpaceError, FileError, WeightError, InterruptedRunError.
        """
        for text in plan.notes:
            listen(Note(text))
        order = self._order.ending_in(self._source, changed_by(plan))
        with opened(plan.file) as source, output_errors(self.path):
            jobs = {job.name: job for job in jobs_of(plan, source)}
            # With the source's own metadata the header keeps its length, so all tensors keep their offsets.
            gguf = plan_gguf(plan.file.metadata, [jobs[name] for name in order.names])
            wanted = {name: (gguf.offsets[name], jobs[name].type) for name in order.names}
            missing = [jobs[name] for name in order.names if self._held.get(name) != wanted[name]]
            self._held = {}
            require_space(self.path.parent, gguf.size - os.fstat(self._descriptor).st_size)
            write_at(self._descriptor, gguf.header, 0)
            self._encode(missing, gguf.offsets, listen, stop)
            os.ftruncate(self._descriptor, gguf.size)
            source.refuse_changed()
        self._order, self._held = order, wanted

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
