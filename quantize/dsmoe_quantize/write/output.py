"""Write a GGUF model from tensors of any source: crash-safe, resumable, on all cores.

Under a lock, hidden files beside the output are filled, with a journal of finished tensors; then they are
synced, verified and renamed. Converter and quantizer both write through `write_output`.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.base.sizes import format_size
from dsmoe_local.model.gguf_file import Field, identity_of
from dsmoe_local.model.gguf_writer import GgufPlan, plan_files
from dsmoe_local.model.split_name import MAX_FILES
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.write import kernels
from dsmoe_quantize.write.encoder import TensorJob, check_job
from dsmoe_quantize.write.pipeline import Effects, Journaled, Syncer, encode_all, n_cores
from dsmoe_quantize.write.unfinished import (
    UnfinishedOutput,
    existing_splits,
    exists_error,
    final_paths,
    journal_of,
)

Arrange: TypeAlias = Callable[[Sequence[TensorJob]], Sequence[TensorJob]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run wrote: `n_bytes`, of which `n_weight_bytes` are weights.

    `path` is the output, or the first of its `n_files`. `n_resumed` tensors were taken over from an
    interrupted run. `peak_memory` in bytes is that of the process so far plus that of its largest child.
    """

    path: Path
    n_bytes: int
    n_weight_bytes: int
    n_tensors: int
    n_weights: int
    n_resumed: int
    seconds: float
    peak_memory: int
    n_files: int = 1

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights, without the header."""
        return 8 * self.n_weight_bytes / self.n_weights


def write_output(
    out: Path,
    metadata: Mapping[str, Field],
    jobs: Sequence[TensorJob],
    fingerprint: Mapping[str, object],
    *,
    sources: Sequence[Path] = (),
    split_max_size: int | None = None,
    threads: int = 0,
    force: bool = False,
    arrange: Arrange = list,
    journaled: Journaled = lambda names: None,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Summary:
    """Write `metadata` and then `jobs`, in this order, to `out`, which appears complete or not at all.

    If it would exceed `split_max_size` bytes, it is split into several files; see `gguf_writer.plan_files`.

    `arrange` decides the order in which the tensors that an interrupted run has left are encoded. `journaled`
    is called with the names of tensors that are synced and in the journal: no later run encodes them again.

    `fingerprint` holds everything that decides the bytes (the source's identity, the options) as JSON values,
    by names that a user understands. An interrupted run is continued if its fingerprint is the same,
    otherwise it is started over. `sources` are the files read; the output must not be one of them. `threads`
    0 means all cores. `listen` is called from one thread at a time. `stop` ends the run within two seconds.

    Raises UsageError (the output is a source or not a file), LockedError, NoSpaceError, FileError,
    WeightError, InterruptedRunError, and what the row sources raise. After an error an existing output is
    unchanged, and finished tensors are kept for the next run, except after a WeightError.
    """
    started = time.monotonic()
    for job in jobs:
        check_job(job)
    with durable.output_errors(out):
        out = _checked(out, sources)
        plans = _plans(metadata, jobs, split_max_size)
        for path in final_paths(out, len(plans)):
            _refuse_place(path, sources)
        fingerprint = {
            **fingerprint,
            "--split-max-size": split_max_size,
            "llama-cpp-python": kernels.version(),
        }
        before = _states(sources)
        with durable.locked(out), UnfinishedOutput(out, plans, fingerprint, listen, force) as unfinished:
            if not unfinished.is_verified:
                stop = stop or threading.Event()
                _fill(unfinished, jobs, arrange, journaled, threads or n_cores(), listen, stop)
                _refuse_changes(before, unfinished)
                reach("output.complete")
            unfinished.publish(jobs)
            n_resumed = len(jobs) if unfinished.is_verified else len(unfinished.done)
    return Summary(
        unfinished.path,
        unfinished.size,
        n_weight_bytes=sum(job.n_bytes for job in jobs),
        n_tensors=len(jobs),
        n_weights=sum(job.n_rows * job.n_columns for job in jobs),
        n_resumed=n_resumed,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        n_files=len(plans),
    )


def refuse_early(out: Path, force: bool, sources: Sequence[Path] = (), *, split: bool = False) -> None:
    """Raise the errors of `write_output` about `out` itself, for callers that do long work before it.

    `split`: the output may be split into several files.
    """
    with durable.output_errors(out):
        out = _checked(out, sources)
        existing = existing_splits(out) if split else [out]
        # With a journal beside it, the output may be that of a run that ended before it removed its journal.
        if existing and existing[0].exists() and not force and not journal_of(out).exists():
            raise exists_error(existing[0])


def peak_memory() -> int:
    """Return the peak memory of this process plus that of its largest finished child, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * sum(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def _plans(
    metadata: Mapping[str, Field], jobs: Sequence[TensorJob], max_size: int | None
) -> tuple[GgufPlan, ...]:
    """Return the plan of each file. UsageError if there are too many."""
    plans = plan_files(metadata, jobs, max_size)
    if len(plans) > MAX_FILES:
        raise UsageError(
            f"the model would be split into {len(plans)} files",
            where=f"--split-max-size {format_size(max_size or 0)}",
            remedy=f"give a size that leads to at most {MAX_FILES} files",
        )
    return plans


def _fill(
    unfinished: UnfinishedOutput,
    jobs: Sequence[TensorJob],
    arrange: Arrange,
    journaled: Journaled,
    threads: int,
    listen: Listener,
    stop: threading.Event,
) -> None:
    """Encode the tensors that the hidden files lack, and sync them."""
    missing = arrange([job for job in jobs if job.name not in unfinished.done])
    n_total = sum(job.n_bytes for job in jobs)
    n_done = sum(job.n_bytes for job in jobs if job.name in unfinished.done)
    listen(Started("encoding", n_total, n_done))
    listening = threading.Lock()

    def advanced(job: TensorJob, n_bytes: int) -> None:
        nonlocal n_done
        with listening:
            n_done += n_bytes
            listen(Advanced(n_bytes, job.name))

    syncer = Syncer(unfinished.sync, unfinished.journal, journaled)
    effects = Effects(lambda data, position: unfinished.write(data.data, position), advanced, syncer.finished)
    try:
        encode_all(missing, unfinished.offsets, effects, threads, stop)
        if n_done != n_total:
            written = f"{format_size(n_done)} of {format_size(n_total)} written"
            if stop.is_set():
                raise InterruptedRunError(
                    f"interrupted: {written}", remedy="run the same command again to continue"
                )
            # A bug in the pipeline. The file has holes, which the check of its header would not find.
            raise RuntimeError(f"the encoder ended early: {written}")
    except BaseException as error:
        syncer.abandon()
        if isinstance(error, WeightError):
            unfinished.discard()
        raise
    syncer.close()
    unfinished.sync()
    listen(Finished("encoding"))


def _states(sources: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Return the identity of each file; missing files are left out."""
    found = {}
    for source in sources:
        with suppress(FileNotFoundError):
            found[source] = identity_of(source.stat())
    return found


def _refuse_changes(before: Mapping[Path, tuple[int, int, int]], unfinished: UnfinishedOutput) -> None:
    """Raise FileError if a source has changed since `before`: the output would be a mixture."""
    for source, state in _states(before).items():
        if state != before[source]:
            unfinished.discard()
            raise FileError("the source changed while it was read", where=source, remedy="run again")


def _checked(out: Path, sources: Sequence[Path]) -> Path:
    """Resolve `out`, which must be a regular file or not exist, and must not be a source."""
    try:
        out = out.resolve()
    except RuntimeError as error:
        raise UsageError("the output's links lead in a circle", where=out) from error
    if not out.parent.is_dir():
        raise FileError("the output's folder does not exist", where=out.parent, remedy="create it first")
    _refuse_place(out, sources)
    return out


def _refuse_place(path: Path, sources: Sequence[Path]) -> None:
    if path.exists() and not path.is_file():
        raise UsageError("the output is not a file", where=path, remedy="name a file to write")
    for source in sources:
        if durable.same_file(source, path):
            raise UsageError("input and output are the same file", where=source, remedy="name another output")
