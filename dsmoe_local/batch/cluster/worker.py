"""A worker of a batch: an engine on some machine, which answers the lines that it is given.

It runs in a process of the cluster. Errors are returned, not raised, because another process reads them.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local import __version__
from dsmoe_local.base import durable
from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, LockedError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.batch.cluster.interface import Answer, Item, Report
from dsmoe_local.batch.cluster.model_copy import ModelCopy
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.batch.line_engine import Collector, LineEngine, Result
from dsmoe_local.batch.lines import Line, hash64
from dsmoe_local.batch.records import Failure
from dsmoe_local.batch.writer import record_of
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.load.parallel import Workload, choose_parallel
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelInfo, ModelOptions
from dsmoe_local.model.identity import has_identity


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What all workers of a batch need to know.

    `model.path` is the file on the machine that runs the batch; `identity` is its `file_identity`. `template`
    is the content of the file that `model.chat_template` names, if it names one. `n_parallel`: requests at
    once; None: what suits `workload`, the share of one worker. `factory` is that of `EngineClient.load`.
    """

    batch: BatchOptions
    model: ModelOptions
    identity: str
    workload: Workload
    n_parallel: int | None = None
    template: bytes | None = None
    log_file: Path | None = None
    factory: str | None = None
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is loaded. `capacity`: the lines that keep the engine busy."""

    info: ModelInfo
    capacity: int


@dataclass(frozen=True, slots=True)
class LoadLater:
    """Another run copies the model to this folder, or has just done so. `load` may find it after a while."""


class NoModelError(FileError):
    """This machine does not have the model."""


class Worker:
    """Answers lines with an engine in a child process. Methods must not be called at the same time."""

    def __init__(self, options: WorkerOptions, n_cpus: int, n_workers: int = 1) -> None:
        """Use `n_cpus` logical CPUs. `n_workers` share the cores and the memory of this machine."""
        self._options = options
        self._n_cpus = n_cpus
        self._n_workers = n_workers
        self._engine: EngineClient | None = None
        self._lines: LineEngine | None = None
        self._finished: queue.SimpleQueue[Collector] = queue.SimpleQueue()
        self._n_tokens = 0  # of requests that have ended, as the next one
        self._n_events = 0
        self._copy: ModelCopy | None = None

    def load(self) -> Loaded | DsmoeError:
        """Load the model, or load it again after a crash of the engine. Return the error if that fails."""
        try:
            if self._engine is None:
                _check_version(self._options.version)
            # After a crash, too: the file may have been replaced.
            path = self._find_model()
            if self._engine is None or path != self._engine.options.path:
                self.close()
                self._engine = EngineClient.load(
                    self._model_options(path), log_file=self._options.log_file, factory=self._options.factory
                )
            else:
                self._engine.encode("a")
            # Requests that ended with the last process may still be in the old queue.
            self._finished = queue.SimpleQueue()
            self._n_tokens = self._n_events = 0
            self._lines = LineEngine(self._engine, self._options.batch, self._finished.put)
        except DsmoeError as error:
            return error
        return Loaded(self._engine.info, self._lines.capacity)

    def work(self, items: Sequence[Item], seconds: float, more_seconds: float) -> Report:
        """Start lines. Report when a line is answered, with what else is answered within `more_seconds`.

        Report earlier if the engine needs more lines, and after `seconds` if none is answered.
        """
        assert self._lines is not None
        answers: list[Answer] = []
        try:
            for item in items:
                self._accept(item.task, item.line, self._lines.begin(item.task, item.line), answers)
            began = time.monotonic()
            end = began + (more_seconds if answers else seconds)
            while self._lines.running or not items:
                needs_more = answers and len(self._lines.running) <= self._lines.capacity // 2
                left = 0.0 if needs_more else max(0.0, end - time.monotonic())
                try:
                    collector = self._finished.get(timeout=left)
                except queue.Empty:
                    break
                end = min(end, time.monotonic() + more_seconds)
                self._n_tokens += collector.builder.n_tokens
                self._n_events += collector.n_events
                self._accept(collector.task, collector.line, self._lines.settle(collector), answers)
        except DsmoeError as error:
            return self._report(answers, error)
        return self._report(answers)

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()

    def begin_copy(self, n_bytes: int) -> DsmoeError | LoadLater | None:
        """Begin to copy the model to this machine, whose cache folder other machines may share."""
        try:
            self._copy = ModelCopy(self._copy_folder, n_bytes)
            self._find_model()
            self._copy.close()
        except LockedError:
            pass
        except NoModelError:
            return None
        except DsmoeError as error:
            return error
        return LoadLater()

    def write_copy(self, name: str, content: bytes) -> DsmoeError | None:
        """Append to a file of the copy."""
        assert self._copy is not None
        try:
            self._copy.write(name, content)
        except DsmoeError as error:
            self._copy.close()
            return error
        return None

    def finish_copy(self, digest: str) -> DsmoeError | None:
        """Verify the copy, whose bytes have the BLAKE2b digest `digest`. `load` then uses it."""
        assert self._copy is not None
        try:
            self._copy.finish(self._options.model.path.name, self._options.identity, digest)
        except DsmoeError as error:
            self._copy.close()
            return error
        return None

    def _accept(self, task: int, line: Line, result: Result, answers: list[Answer]) -> None:
        if isinstance(result, EngineError):
            raise result
        if result is None:
            return
        record = record_of(self._options.batch.form, line, result)
        tokens = (0, 0, 0)
        if not isinstance(result, Failure):
            tokens = (result.n_prompt_tokens, result.n_cached_tokens, result.n_completion_tokens)
        answers.append(Answer(task, record.content, record.failure, *tokens))

    def _report(self, answers: Sequence[Answer], error: DsmoeError | None = None) -> Report:
        assert self._lines is not None
        n_events = sum(collector.n_events for collector, _ in self._lines.running.values())
        return Report(
            answers,
            error,
            self._n_tokens + self._lines.n_running_tokens,
            self._n_events + n_events,
        )

    @property
    def _copy_folder(self) -> Path:
        return cache_folder() / "batch-models" / self._options.identity.replace(" ", "-")

    def _find_model(self) -> Path:
        """Return the file of the model on this machine: at its own path, or a copy. Raises NoModelError."""
        own = self._options.model.path
        for path in (own, self._copy_folder / own.name):
            if has_identity(path, self._options.identity):
                return path
        what = "another file has the name of the model" if own.is_file() else "the model is missing"
        raise NoModelError(what, where=own, remedy="copy it there, or use --ship-model")

    def _model_options(self, path: Path) -> ModelOptions:
        """Return the options for loading the model on this machine."""
        options = self._options
        model = replace(options.model, path=path)
        if model.n_threads is None:
            n_cores = max(1, physical_cores() // self._n_workers)
            model = replace(model, n_threads=min(self._n_cpus, n_cores))
        if options.template is not None:
            # Named by its content: this process may be killed, and then leaves it behind.
            file = cache_folder() / "batch-templates" / f"{hash64(options.template):016x}.jinja"
            durable.make_folders(file.parent)
            durable.write_file(file, options.template)
            model = replace(model, chat_template=str(file))
        return choose_parallel(model, options.workload, options.n_parallel, n_engines=self._n_workers)


def _check_version(version: str) -> None:
    """FormatError if this machine has another version of dsmoe-local than the one that runs the batch."""
    if version != __version__:
        raise FormatError(
            f"it has dsmoe-local {__version__}, the batch is run by {version}",
            remedy="install the same version on all nodes",
        )
