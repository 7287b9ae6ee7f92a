"""The engine in this process: one thread owns the model and generates, one request at a time, in order.

Callers see `TextEngine`: typed requests in, typed events out. The thread is what lets Ctrl-C interrupt a
prompt in the middle: the caller's thread only waits, and may cancel. What is loaded and how is `loading`'s
concern.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.generation import Generation, Session
from dsmoe_local.engine.load.session import load_session
from dsmoe_local.engine.streaming import stream
from dsmoe_local.engine.types import (
    Deliver,
    ModelInfo,
    ModelOptions,
    Observation,
    Prompt,
    Request,
    Ticket,
    TokenEvent,
)


@dataclass(slots=True, eq=False)
class _Job:
    """A submitted request on its way; the caller's Ticket."""

    engine: Engine
    request: Request
    submitted: float
    deliver: Deliver
    cancelled: bool = False

    def cancel(self) -> None:
        self.engine._cancel(self)


class Engine:
    """A loaded model. Make it with `Engine.load`; close it, or use it as a context manager."""

    def __init__(self, options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Reentrant, and no Event for the flag: `cancel` may be called by a signal handler in the middle of
        # `submit`.
        self._lock = threading.RLock()
        self._waiting: dict[str, _Job] = {}
        self._session: Session | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._loaded = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(lambda: load_session(options, listen, stop),),
            name="dsmoe-engine",
            daemon=True,
        )
        self._thread.start()

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> Self:
        """Check the file, plan the memory and load. Setting `stop`, or Ctrl-C, gives up.

        `listen` hears the progress and notes, from the engine's thread. Raises FormatError or FileError (the
        file), OutOfMemoryError, UsageError (an option the model cannot have), ModelLoadError,
        InterruptedRunError.
        """
        stop = stop or threading.Event()
        engine = cls(options, listen, stop)
        try:
            engine._loaded.wait()
        except BaseException:
            stop.set()
            # Loading may be over by now: the thread then waits for work.
            engine._jobs.put(None)
            engine._thread.join()
            raise
        if engine._failure is not None:
            engine._thread.join()
            raise engine._failure
        if stop.is_set():
            # It came when there was nothing left to give up.
            engine.close()
            raise InterruptedRunError("loading was interrupted")
        return engine

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._require_session().info

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply (see TextEngine). Requests wait for those submitted before them."""
        return stream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Generate without waiting (see TextEngine)."""
        self._require_session()
        job = _Job(self, request, time.perf_counter(), deliver)
        with self._lock:
            if request.id in self._waiting:
                raise EngineError(f"a request with the id {request.id!r} is already running")
            self._waiting[request.id] = job
        self._jobs.put(job)
        return job

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read. Unknown ids are fine."""
        with self._lock:
            job = self._waiting.get(request_id)
        if job is not None:
            self._cancel(job)

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            job.cancelled = True
            # Only the running request has a generation to abort; the flag suffices for those that wait.
            if self._session is not None and self._session.running == job.request.id:
                self._session.abort()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The exact token ids of `prompt`. Raises PromptError, TemplateError."""
        return self._require_session().encoder.encode(prompt)

    def log(self) -> tuple[str, ...]:
        """llama.cpp's latest log lines, safe to print."""
        return self._require_session().log()

    def observe(self, name: str) -> Observation:
        """What the observer of that name has seen. EngineError if none was loaded."""
        raise EngineError(f"no observer {name!r} was loaded")

    def close(self) -> None:
        """End all requests and free the model. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            jobs = list(self._waiting.values())
        for job in jobs:
            self._cancel(job)
        self._jobs.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_session(self) -> Session:
        if self._session is None or self._closed:
            raise EngineError("the engine is closed")
        return self._session

    def _run(self, load: Callable[[], Session]) -> None:
        """The engine's thread."""
        try:
            self._session = load()
        except BaseException as error:  # noqa: BLE001 - raised again by `load` in the caller's thread
            self._failure = error
            return
        finally:
            self._loaded.set()
        try:
            while (job := self._jobs.get()) is not None:
                self._generate(self._session, job)
        finally:
            self._session.close()

    def _generate(self, session: Session, job: _Job) -> None:
        with self._lock:
            session.running = job.request.id
            session.clear_abort()
        try:
            for event in Generation(session, job.request, job.submitted, lambda: job.cancelled):
                job.deliver(event)
            end: BaseException | None = None
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that reads the events
            end = error
        finally:
            with self._lock:
                session.running = None
                del self._waiting[job.request.id]
        job.deliver(end)
