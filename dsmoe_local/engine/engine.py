"""An engine in this process: one thread owns the model and decodes all running requests in batches.

Other threads tokenize prompts and compile grammars, so that decoding does not wait for them. `core` computes
one step; `load` loads the model.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.cache_file import sync_cache
from dsmoe_local.engine.core import Core
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.event_stream import EventStream
from dsmoe_local.engine.interface import Deliver
from dsmoe_local.engine.large_stack import large_stack
from dsmoe_local.engine.load.loaded_model import LoadedModel, load_model
from dsmoe_local.engine.native.library import echo_log
from dsmoe_local.engine.reasoning import template_variables
from dsmoe_local.engine.reply import Job
from dsmoe_local.engine.sampling import check_request, is_constrained
from dsmoe_local.engine.types import (
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TokenEvent,
    Tool,
    check_prompt,
)

T = TypeVar("T")

_FRAME = 1 / 60
"""Seconds between calls of `after_step`. Waking the client for each token slows a small model down by 5%."""


class _Ticket:
    """See `interface.Ticket`."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job

    def cancel(self) -> None:
        """Cancel the request. Do nothing if it has ended."""
        self._engine._cancel(self._job)


class Engine:
    """A loaded model. Create it with `Engine.load` and close it, or use it as a context manager.

    Both callbacks run in the engine's thread. `after_step` is called when delivered events should be passed
    on: after a step, at most every _FRAME seconds, and before a prefill. `on_fault` is called if the thread
    fails; without it, all requests end with the error.
    """

    def __init__(self, options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> None:
        self.after_step: Callable[[], None] | None = None
        self.on_fault: Callable[[BaseException], None] | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Reentrant, since a signal handler may call `cancel` while the same thread is in `start`.
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._calls: set[Future[Any]] = set()
        self._encoding = threading.Lock()  # held while another thread uses the model's vocabulary
        self._loaded: LoadedModel | None = None
        self._core: Core | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._ready = threading.Event()
        self._last_call = 0.0
        self._close_error: Exception | None = None
        self._intake = ThreadPoolExecutor(1, "dsmoe-intake")
        # Compiling a grammar may take seconds and needs a large stack. Other requests must not wait for it.
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
        """Check the file, plan the memory and load the model. `stop` or Ctrl-C interrupts it.

        `listen` is called with progress and notes in the engine's thread. Raises FormatError or FileError for
        the file, UsageError for an option that the model cannot have, OutOfMemoryError, ModelLoadError and
        InterruptedRunError.
        """
        stop = stop or threading.Event()
        engine = cls(options, listen, stop)
        try:
            engine._ready.wait()
        except BaseException:
            stop.set()
            # If loading has just finished, the thread waits for a task and must be ended.
            engine._inbox.put(None)
            engine._thread.join()
            raise
        if engine._failure is not None:
            engine._thread.join()
            raise engine._failure
        if stop.is_set():
            # It was set after the loader checked it for the last time.
            engine.close()
            raise InterruptedRunError("loading was interrupted")
        return engine

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._require_loaded().info

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply (see TextEngine)."""
        return EventStream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> _Ticket:
        """Start to generate a reply (see TextEngine)."""
        job = Job(request, deliver)
        with self._lock:
            self._require_loaded()
            if request.id in self._jobs:
                raise EngineError(f"a request with the id {request.id!r} is already running")
            self._jobs[request.id] = job
            (self._compiling if is_constrained(request) else self._intake).submit(self._take_in, job)
        return _Ticket(self, job)

    def cancel(self, request_id: str) -> None:
        """End a request (see TextEngine)."""
        with self._lock:
            job = self._jobs.get(request_id)
        if job is not None:
            self._cancel(job)

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: tuple[Tool, ...] = (),
    ) -> tuple[int, ...]:
        """Return the token ids of `prompt` (see TextEngine)."""
        check_prompt(prompt)
        with self._encoding:
            return self._require_loaded().encoder.encode(
                prompt,
                chat_template_kwargs,
                continue_final_message=continue_final_message,
                tools=tools,
                stopped=lambda: self._closed,
            )

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token's text (see TextEngine)."""
        with self._encoding:
            loaded = self._require_loaded()
            loaded.encoder.check_ids(token_ids)
            return tuple(map(loaded.model.text_of, token_ids))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sequence of tokens (see TextEngine)."""
        with self._encoding:
            loaded = self._require_loaded()
            loaded.encoder.check_ids(token_ids)
            return loaded.model.text_of_all(token_ids)

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write a prefix of these tokens from the KV cache to a file (see TextEngine)."""
        count = self._between_steps(lambda core: core.save_cache(path, list(token_ids), start))
        # Syncing may take seconds. The next request can begin in the meantime.
        return count if count and sync_cache(path) else 0

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Load a file of `save_cache` (see TextEngine)."""
        return self._between_steps(lambda core: core.load_cache(path, list(token_ids)))

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers of the model (see TextEngine)."""
        self._between_steps(lambda core: core.set_observers(options))

    def log(self) -> tuple[str, ...]:
        """Return llama.cpp's latest log lines, safe to print."""
        return self._require_loaded().log()

    def observe(self, name: str) -> Observation:
        """Return the summary of an observer (see TextEngine)."""
        loaded = self._require_loaded()
        return self._between_steps(lambda _: loaded.observers.summary(name))

    def check(self) -> None:
        """Raise AssertionError if the scheduler's state is inconsistent. For tests."""
        self._between_steps(lambda core: core.scheduler.check())

    def close(self) -> None:
        """End all requests and free the model. May be called twice.

        Raises the first error of an observer that could not finish its file.
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
        if self._close_error is not None:
            raise self._close_error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_loaded(self) -> LoadedModel:
        if self._loaded is None or self._closed:
            raise EngineError("the engine is closed")
        return self._loaded

    def _between_steps(self, function: Callable[[Core], T]) -> T:
        """Run `function` in the engine's thread, between two steps, and return its result."""
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
        """Deliver the last events of a cancelled request. It may not have been scheduled yet."""
        if job.n_open:
            core.cancel(job)
        elif self._jobs.get(job.request.id) is job:
            self._finish(job, _error_of(job.drop))

    def _take_in(self, job: Job) -> None:
        """Check and encode a request, then pass it to the engine's thread. Runs in an intake thread."""
        loaded, core = self._loaded, self._core
        assert loaded is not None
        assert core is not None
        prompt: tuple[int, ...] = ()
        failure: Exception | None = None
        try:
            if not job.cancelled:
                job.grammar = check_request(loaded.model, job.request, loaded.encoder.tools)
                prompt = loaded.encoder.encode(
                    job.request.prompt,
                    template_variables(job.request.chat_template_kwargs, job.request.reasoning_budget),
                    continue_final_message=job.request.continue_final_message,
                    tools=() if job.request.tools is None else job.request.tools.tools,
                    stopped=lambda: job.cancelled,
                )
        except Exception as error:  # noqa: BLE001 - delivered to the request that caused it
            failure = error
        self._inbox.put(lambda: self._admit(core, job, prompt, failure))

    def _admit(self, core: Core, job: Job, prompt: tuple[int, ...], failure: Exception | None) -> None:
        if job.cancelled:
            return  # `_end_cancelled` has delivered its last events
        error = failure or _error_of(lambda: core.add(job, prompt))
        if error is not None:
            self._finish(job, error)

    def _finish(self, job: Job, error: Exception | None) -> None:
        """End a request. Its id is free before `deliver` is called, so that the caller can use it again."""
        with self._lock:
            del self._jobs[job.request.id]
        _deliver_end(job, error)

    def _shut_intake(self) -> None:
        self._intake.shutdown()
        self._compiling.shutdown()

    def _run(self, load: Callable[[], LoadedModel]) -> None:
        """Load the model, then run tasks and steps until `close`. This is the engine's thread."""
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
                    self._call_after_step()
                core.step()
                # The first token of a reply is passed on at once.
                if reads_prompts or core.idle or time.perf_counter() - self._last_call >= _FRAME:
                    self._call_after_step()
        except BaseException as error:
            self._break_down(error)
            raise
        finally:
            self._close_error = _error_of(loaded.close)

    def _break_down(self, error: BaseException) -> None:
        """End all requests and calls with an internal error of this thread."""
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
            _deliver_end(job, error)

    def _take_tasks(self, core: Core) -> bool:
        """Run the tasks in the inbox; wait for one only if no request runs. Returns False after `close`."""
        while not self._inbox.empty() or core.idle:
            task = self._inbox.get()
            if task is None:
                return False
            task()
            if core.lost is not None:
                raise core.lost
            if core.idle:
                self._call_after_step()
        return True

    def _call_after_step(self) -> None:
        self._last_call = time.perf_counter()
        if self.after_step is not None:
            self.after_step()


def _error_of(function: Callable[[], object]) -> Exception | None:
    """Return the exception that `function` raises, if any."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the caller delivers or raises it
        return error
    return None


def _deliver_end(job: Job, error: BaseException | None) -> None:
    """Deliver the end of a request. An error of its receiver must not affect other requests."""
    try:
        job.deliver(error)
    except Exception:  # noqa: BLE001 - reported like an uncaught exception of a thread
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def load_with_log(options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> Engine:
    """Load like `Engine.load`, and write llama.cpp's log to stderr. For the child process of a client."""
    descriptor = sys.stderr.fileno()
    # Unbuffered, so that no line is lost if the process is killed.
    echo_log(lambda text: os.write(descriptor, text))
    return Engine.load(options, listen, stop)
