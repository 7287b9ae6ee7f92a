"""The engine in this process: one thread owns the model and decodes for all requests that are in.

Callers see `TextEngine`: typed requests in, typed events out. A second thread turns prompts into token ids
and checks requests, so that a step never waits for either. What a step does is `core`'s concern, what is
loaded and how that of `load`.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.cache_file import sync_cache
from dsmoe_local.engine.core import Core
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.large_stack import large_stack
from dsmoe_local.engine.load.loaded_model import LoadedModel, load_model
from dsmoe_local.engine.reply import Job
from dsmoe_local.engine.sampling import check_request, is_constrained
from dsmoe_local.engine.streaming import stream
from dsmoe_local.engine.types import (
    Deliver,
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TokenEvent,
    check_prompt,
)

T = TypeVar("T")

_FRAME = 1 / 60
"""Seconds. To wake another process for every token of a small model takes 5% of its speed."""


class _Ticket:
    """A caller's hold on a request."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job

    def cancel(self) -> None:
        """End it; nothing happens once it is over."""
        self._engine._cancel(self._job)


class Engine:
    """A loaded model. Make it with `Engine.load`; close it, or use it as a context manager.

    `after_step`, when set, is called in the engine's thread when the events delivered since the last call are
    to be passed on: after a step, but no more often than an eye can follow, and before anything that may take
    long. `on_fault`, when set, is called there instead of telling the requests if the thread itself fails.
    """

    def __init__(self, options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> None:
        self.after_step: Callable[[], None] | None = None
        self.on_fault: Callable[[BaseException], None] | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Reentrant, and no Event for the flag: `cancel` may be called by a signal handler in the middle of
        # `start`.
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._calls: set[Future[Any]] = set()
        self._encoding = threading.Lock()  # held while the model's vocabulary is in use outside its thread
        self._loaded: LoadedModel | None = None
        self._core: Core | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._ready = threading.Event()
        self._told = 0.0
        self._unclosed: Exception | None = None
        self._intake = ThreadPoolExecutor(1, "dsmoe-intake")
        # Compiling a grammar may take seconds and much stack. Requests without one do not wait for that.
        self._compiling = large_stack("dsmoe-grammars")
        self._thread = threading.Thread(
            target=self._run,
            args=(lambda: load_model(options, listen, stop),),
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
            engine._ready.wait()
        except BaseException:
            stop.set()
            # Loading may be over by now: the thread then waits for work.
            engine._inbox.put(None)
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
        return self._require_loaded().info

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply (see TextEngine)."""
        return stream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> _Ticket:
        """Generate without waiting (see TextEngine)."""
        job = Job(request, deliver)
        with self._lock:
            self._require_loaded()
            if request.id in self._jobs:
                raise EngineError(f"a request with the id {request.id!r} is already running")
            self._jobs[request.id] = job
            (self._compiling if is_constrained(request) else self._intake).submit(self._take_in, job)
        return _Ticket(self, job)

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read. Unknown ids are fine."""
        with self._lock:
            job = self._jobs.get(request_id)
        if job is not None:
            self._cancel(job)

    def encode(self, prompt: Prompt, *, continue_final_message: bool = False) -> tuple[int, ...]:
        """The exact token ids of `prompt` (see TextEngine). Raises PromptError, TemplateError."""
        check_prompt(prompt)
        with self._encoding:
            encoder = self._require_loaded().encoder
            return encoder.encode(
                prompt, continue_final_message=continue_final_message, stopped=lambda: self._closed
            )

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token's own text. PromptError for an id that the vocabulary does not have."""
        with self._encoding:
            loaded = self._require_loaded()
            loaded.encoder.check_ids(token_ids)
            return tuple(map(loaded.model.text_of, token_ids))

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write what the KV cache holds of these tokens to a new file (see TextEngine)."""
        count = self._between_steps(lambda core: core.save_cache(path, list(token_ids), start))
        # The disk may take seconds, in which the next request can begin.
        return count if count and sync_cache(path) else 0

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Make the KV cache hold what such a file does (see TextEngine)."""
        return self._between_steps(lambda core: core.load_cache(path, list(token_ids)))

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers of the model (see TextEngine)."""
        self._between_steps(lambda core: core.set_observers(options))

    def log(self) -> tuple[str, ...]:
        """llama.cpp's latest log lines, safe to print."""
        return self._require_loaded().log()

    def observe(self, name: str) -> Observation:
        """What the observer of that name has seen, between two steps. EngineError if none was loaded."""
        loaded = self._require_loaded()
        return self._between_steps(lambda _: loaded.observers.summary(name))

    def check(self) -> None:
        """AssertionError unless the scheduler's books agree."""
        self._between_steps(lambda core: core.scheduler.check())

    def close(self) -> None:
        """End all requests and free the model. Closing twice is fine.

        Raises what the first of the observers raised whose file could not be ended.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            jobs = list(self._jobs.values())
        for job in jobs:
            self._cancel(job)
        self._shut_intake()
        with self._encoding:
            self._inbox.put(None)
            self._thread.join()
        if self._unclosed is not None:
            raise self._unclosed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_loaded(self) -> LoadedModel:
        if self._loaded is None or self._closed:
            raise EngineError("the engine is closed")
        return self._loaded

    def _between_steps(self, function: Callable[[Core], T]) -> T:
        """What `function` returns in the engine's thread."""
        core = self._core
        assert core is not None
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function(core))
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                future.set_exception(error)
            self._calls.discard(future)

        with self._lock:
            self._require_loaded()
            self._calls.add(future)
            self._inbox.put(call)
        return future.result()

    def _cancel(self, job: Job) -> None:
        with self._lock:
            if self._jobs.get(job.request.id) is not job or job.cancelled:
                return
            job.cancelled = True
        core = self._core
        assert core is not None
        core.interrupt(job)
        self._inbox.put(lambda: self._end_cancelled(core, job))

    def _end_cancelled(self, core: Core, job: Job) -> None:
        """Close a request's stream, also where its intake is still at work, or has not begun."""
        if job.n_open:
            core.cancel(job)
        elif self._jobs.get(job.request.id) is job:
            self._finish(job, _error_of(job.drop))

    def _take_in(self, job: Job) -> None:
        """An intake thread: from a request to something that can be scheduled."""
        loaded, core = self._loaded, self._core
        assert loaded is not None
        assert core is not None
        prompt: tuple[int, ...] = ()
        failure: Exception | None = None
        try:
            if not job.cancelled:
                job.grammar = check_request(loaded.model, job.request)
                prompt = loaded.encoder.encode(
                    job.request.prompt,
                    continue_final_message=job.request.continue_final_message,
                    stopped=lambda: job.cancelled,
                )
        except Exception as error:  # noqa: BLE001 - delivered to the request that caused it
            failure = error
        self._inbox.put(lambda: self._admit(core, job, prompt, failure))

    def _admit(self, core: Core, job: Job, prompt: tuple[int, ...], failure: Exception | None) -> None:
        if job.cancelled:
            return  # whoever cancelled it has its stream closed
        error = failure or _error_of(lambda: core.add(job, prompt))
        if error is not None:
            self._finish(job, error)

    def _finish(self, job: Job, error: Exception | None) -> None:
        """The last word on a request. Its id is free before the caller can hear of it."""
        with self._lock:
            del self._jobs[job.request.id]
        _tell_end(job, error)

    def _shut_intake(self) -> None:
        self._intake.shutdown()
        self._compiling.shutdown()

    def _run(self, load: Callable[[], LoadedModel]) -> None:
        """The engine's thread."""
        try:
            loaded = load()
            with ExitStack() as made:
                made.callback(loaded.close)
                self._core = core = Core(loaded, self._finish)
                made.pop_all()
            self._loaded = loaded
        except BaseException as error:  # noqa: BLE001 - raised again by `load` in the caller's thread
            self._failure = error
            self._shut_intake()
            return
        finally:
            self._ready.set()
        try:
            while self._take_tasks(core):
                reads_prompts = core.reads_prompts
                if reads_prompts:
                    self._tell()
                core.step()
                # A first token is not kept waiting.
                if reads_prompts or core.idle or time.perf_counter() - self._told >= _FRAME:
                    self._tell()
        except BaseException as error:
            self._break_down(error)
            raise
        finally:
            self._unclosed = _error_of(loaded.close)

    def _break_down(self, error: BaseException) -> None:
        """A fault of our own: nobody may wait for this thread any more."""
        if self.on_fault is not None:
            self.on_fault(error)
            return
        with self._lock:
            self._closed = True
            jobs, self._jobs = list(self._jobs.values()), {}
            calls, self._calls = self._calls, set()
        for call in calls:
            call.set_exception(error)
        for job in jobs:
            _tell_end(job, error)

    def _take_tasks(self, core: Core) -> bool:
        """Do what came in; waits only where there is nothing to compute. False at the end."""
        while not self._inbox.empty() or core.idle:
            task = self._inbox.get()
            if task is None:
                return False
            task()
            if core.lost is not None:
                raise core.lost
            if core.idle:
                self._tell()
        return True

    def _tell(self) -> None:
        self._told = time.perf_counter()
        if self.after_step is not None:
            self.after_step()


def _error_of(function: Callable[[], object]) -> Exception | None:
    """What `function` raises."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the caller's to deliver, or to raise
        return error
    return None


def _tell_end(job: Job, error: BaseException | None) -> None:
    """Close a request's stream. A receiver that fails is nobody else's concern."""
    try:
        job.deliver(error)
    except Exception:  # noqa: BLE001 - reported as any thread's
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
