"""The client's side of one child process: its start, messages and end.

There are three threads. The reader starts the process, reads messages and delivers events. The sender writes
frames, so that Ctrl-C in a caller cannot leave half a frame. The third thread reads the log. With workers, a
fourth one kills a process that makes no progress.
"""

from __future__ import annotations

import copy
import itertools
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import Deliver, TextEngine
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.log import LogKeeper
from dsmoe_local.engine.process.spawn import (
    broken_error,
    crash_error,
    lost_a_worker,
    lost_worker_error,
    no_progress_error,
    spawn_engine,
)
from dsmoe_local.engine.types import ModelInfo, ModelOptions, Request, TokenEvent

POLL = 0.05  # seconds between checks whether a load must stop
SILENT_SECONDS = 300.0  # the longest step, with workers: llama.cpp waits for them without a limit
_EXIT_SECONDS = 1.0  # for a child that was asked to exit
_LOG_SECONDS = 10.0  # for the last lines of the log; a process that the child has started may keep it open
_KILL_SECONDS = 5.0  # for a child that was killed; after that the system must reap it

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _PendingCall:
    """A call that has not been answered: the type of its result, and the queue for the result or error."""

    kind: Any
    answer: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


def interrupted_load() -> InterruptedRunError:
    """Return the error for a load that was interrupted."""
    return InterruptedRunError("loading was interrupted")


class ChildEndedError(Exception):
    """The child ended before the call was sent. `failure` is the reason."""

    def __init__(self, failure: EngineError) -> None:
        super().__init__(str(failure))
        self.failure = failure


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A running request. It is the caller's Ticket."""

    child: Child
    number: int
    request_id: str
    deliver: Deliver

    def cancel(self) -> None:
        self.child.cancel_number(self.number)


class Child:
    """A child process with a loaded model.

    `failure` is set to the reason when the process ends. `options` are used to start its replacement.
    """

    def __init__(self, options: ModelOptions, log: LogKeeper, listen: progress.Listener) -> None:
        self.options = options
        self.failure: EngineError | None = None
        self.info: ModelInfo
        self._log = log
        self._listen = listen
        self._kill_reason: EngineError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned = threading.Event()
        self._loaded = threading.Event()
        self._load_failure: BaseException | None = None
        # Protects the running requests and calls, which callers add and the reader removes.
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._by_id: dict[str, _Running] = {}
        self._ignored: set[int] = set()  # requests whose `deliver` raised; more events may arrive
        self._calls: dict[int, _PendingCall] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._last_message = time.monotonic()
        self._reader = threading.Thread(target=self._run, name="dsmoe-client", daemon=True)

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        factory: str,
        log: LogKeeper,
        listen: progress.Listener,
        stopped: Callable[[], bool],
    ) -> Self:
        """Start a process and load the model in it.

        If `stopped` returns True or the call is interrupted, the process is killed. `factory` is that of
        `EngineClient.load`. Raises the errors of the load, and InterruptedRunError.
        """
        frame = wire.pack(("load", factory, wire.to_plain(options)))
        if stopped():
            raise interrupted_load()
        log.begin()
        child = cls(options, log, listen)
        child._outbox.put(frame)
        try:
            child._reader.start()
            while not child._loaded.wait(POLL) and not stopped():
                pass
            if child._load_failure is not None:
                raise child._load_failure
            if stopped():
                raise interrupted_load()
        except BaseException:
            child.kill()
            raise
        return child

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    # Requests and calls, from any thread.

    def start(self, request: Request, deliver: Deliver) -> _Running:
        """See TextEngine. Raises ChildEndedError."""
        number = next(self._numbers)
        frame = wire.pack(("start", number, wire.to_plain(request)))
        running = _Running(self, number, request.id, deliver)
        with self._lock:
            self._check_alive()
            if request.id in self._by_id:
                raise EngineError(f"a request with the id {request.id!r} is already running")
            self._running[number] = self._by_id[request.id] = running
        self._outbox.put(frame)
        return running

    def cancel(self, request_id: str) -> None:
        """See TextEngine. Takes no lock, since a signal handler may call it while `start` holds the lock."""
        running = self._by_id.get(request_id)
        if running is not None:
            running.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests. Takes no lock, like `cancel`."""
        for running in list(self._running.values()):
            running.cancel()

    def cancel_number(self, number: int) -> None:
        """Cancel the request with that number, if it is running."""
        if number in self._running:
            self._outbox.put(wire.pack(("cancel", number)))

    def call(
        self, method: Callable[Concatenate[TextEngine, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a method of TextEngine that is in `wire.CALLS`. Raises its errors and ChildEndedError."""
        name = method.__name__
        arguments = dict(zip(wire.CALLS[name], args, strict=False)) | kwargs
        number = next(self._numbers)
        frame = wire.pack(("call", number, name, wire.to_plain(arguments)))
        pending = _PendingCall(wire.CALLS[name]["return"])
        with self._lock:
            self._check_alive()
            self._calls[number] = pending
        self._outbox.put(frame)
        value = pending.answer.get()
        if isinstance(value, BaseException):
            raise value
        answer: T = value
        return answer

    def _check_alive(self) -> None:
        if self.end_reason is not None:
            raise ChildEndedError(copy.copy(self.end_reason))

    # The end of the process.

    @property
    def end_reason(self) -> EngineError | None:
        """The reason why the process accepts no more calls; None while it accepts calls."""
        return self.failure or self._kill_reason

    def kill_for(self, reason: EngineError) -> None:
        """Kill the process without waiting. Running requests and calls end with `reason`.

        Takes no lock: signal handlers may call it.
        """
        self._kill_reason = self._kill_reason or reason
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Ask the process to end its requests and exit. Kill it if it does not."""
        self._kill_reason = self._kill_reason or EngineError("the engine is closed")
        self._outbox.put(wire.pack(("close",)))
        self._join(_EXIT_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the process if it is running, and reap it."""
        self._kill_reason = self._kill_reason or EngineError("the engine is closed")
        if self._reader.ident is None:
            return  # `load` was interrupted before it started the thread
        self._spawned.wait()
        if self._process is not None:
            self._process.kill()
        self._join(_KILL_SECONDS)

    def _join(self, seconds: float) -> None:
        if threading.current_thread() is not self._reader:
            self._reader.join(seconds)

    # The reader's thread.

    def _run(self) -> None:
        """Start the process and read until it ends. On Linux, it is killed when this thread ends."""
        try:
            self._process, channel = spawn_engine()
        except BaseException as error:  # noqa: BLE001 - raised again by `load`
            self._load_failure = error
            self._loaded.set()
            return
        finally:
            self._spawned.set()
        try:
            failure = self._attend(self._process, channel)
        except BaseException as error:  # noqa: BLE001 - delivered to all callers that wait
            self._reap(self._process, at_once=True)
            self._outbox.put(None)
            what = f"internal error in the engine's client: {type(error).__name__}: {error}"
            failure = self._kill_reason or broken_error(what, error, self._log.lines(), "try again")
        self._end(failure)

    def _attend(self, process: subprocess.Popen[bytes], channel: socket.socket) -> EngineError:
        """Read and deliver until the process has ended. Returns the reason."""
        assert process.stdout is not None
        keep = threading.Thread(target=_keep, args=(process.stdout, self._log), name="dsmoe-log", daemon=True)
        send = threading.Thread(target=_send, args=(channel, self._outbox), name="dsmoe-send", daemon=True)
        with channel, channel.makefile("rb", 1 << 16) as source:
            try:
                keep.start()
            except BaseException:
                process.stdout.close()
                raise
            send.start()
            if self.options.workers:
                threading.Thread(target=self._watch, name="dsmoe-watch", daemon=True).start()
            garbled = self._read(source)
            status = self._reap(process, at_once=garbled is not None)
            self._outbox.put(None)
            for thread in (send, keep):
                thread.join(_LOG_SECONDS)
        return self._reason(status, garbled)

    def _watch(self) -> None:
        """Kill the process if it has work, but sends nothing for SILENT_SECONDS."""
        while not self._ended.wait(POLL):
            last = self._last_message
            if not (self._running or self._calls) and self._loaded.is_set():
                self._last_message = time.monotonic()
            elif time.monotonic() - last > SILENT_SECONDS:
                failure = no_progress_error(self.options.workers, SILENT_SECONDS, self._log.lines())
                # Asking the workers takes time: the step may have ended meanwhile.
                if self._last_message == last:
                    self.kill_for(failure)
                    return

    def _read(self, source: wire.Source) -> Exception | None:
        """Handle messages until the socket is closed. Returns the error if a message is malformed."""
        try:
            while (message := wire.receive(source)) is not None:
                self._last_message = time.monotonic()
                kind, *arguments = message
                _TAKE[kind](self, *arguments)
        except (wire.WireError, LookupError, TypeError, ValueError) as error:
            return error
        except OSError:
            # The connection was reset: the process ended without reading everything.
            return None
        return None

    def _reap(self, process: subprocess.Popen[bytes], *, at_once: bool) -> int:
        try:
            if not at_once:
                return process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            # It closed the socket but is still running.
            pass
        process.kill()
        return process.wait()

    def _reason(self, status: int, garbled: Exception | None) -> EngineError:
        if self._kill_reason is not None:
            return self._kill_reason
        log = self._log.lines()
        if garbled is None and self.options.workers and lost_a_worker(log):
            return lost_worker_error(self.options.workers, log)
        if garbled is None:
            return crash_error(status, log, loading=None if self._loaded.is_set() else self.options.path)
        return broken_error("the engine's process sent a malformed message", garbled, log)

    def _end(self, failure: EngineError) -> None:
        """Deliver `failure` to all running requests and calls."""
        self._ended.set()
        with self._lock:
            self.failure = failure
            running, calls = list(self._running.values()), list(self._calls.values())
            self._running.clear()
            self._by_id.clear()
            self._calls.clear()
        if not self._loaded.is_set():
            self._load_failure = failure
            self._loaded.set()
        for request in running:
            self._deliver(request, copy.copy(failure))
        for call in calls:
            call.answer.put(copy.copy(failure))

    def _take_progress(self, value: wire.Plain) -> None:
        event = wire.progress_from_plain(value)
        try:
            self._listen(event)
        except Exception as error:  # noqa: BLE001 - an error of the listener, raised again by `load`
            self._load_failure = error
            self._loaded.set()

    def _take_loaded(self, info: wire.Plain) -> None:
        self.info = wire.from_plain(ModelInfo, info)
        self._loaded.set()

    def _take_failed(self, error: wire.Plain) -> None:
        self._load_failure = wire.error_from_plain(error)
        self._loaded.set()

    def _take_answer(self, number: int, value: wire.Plain) -> None:
        # A malformed answer raises here. The call then ends with the process.
        answer: object = wire.from_plain(self._calls[number].kind, value)
        self._answer(number, answer)

    def _take_refusal(self, number: int, error: wire.Plain) -> None:
        self._answer(number, wire.error_from_plain(error))

    def _answer(self, number: int, value: object) -> None:
        with self._lock:
            call = self._calls.pop(number)
        call.answer.put(value)

    def _take_events(self, events: list[wire.Plain]) -> None:
        for event in events:
            number = event[0]
            if number in self._ignored:
                continue
            running = self._running[number]
            if len(event) > wire.END_LENGTH:
                self._deliver(running, wire.event_from_plain(running.request_id, event))
            else:
                end = None if event[1] is None else wire.error_from_plain(event[1])
                # Remove it first, since `deliver` may start a request with the same id.
                self._remove(running)
                self._deliver(running, end)

    def _remove(self, running: _Running) -> None:
        with self._lock:
            del self._running[running.number]
            del self._by_id[running.request_id]

    def _deliver(self, running: _Running, item: TokenEvent | BaseException | None) -> None:
        """Pass an event to the caller. If `deliver` raises, only its own request is cancelled."""
        try:
            running.deliver(item)
        except Exception:  # noqa: BLE001 - reported like an uncaught exception of a thread
            running.cancel()
            if running.number in self._running:
                self._ignored.add(running.number)
                self._remove(running)
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_TAKE: dict[str, Callable[..., None]] = {
    "progress": Child._take_progress,
    "loaded": Child._take_loaded,
    "failed": Child._take_failed,
    "answer": Child._take_answer,
    "refusal": Child._take_refusal,
    "events": Child._take_events,
}


def _send(channel: socket.socket, outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Write frames from `outbox` until one is None. This is the sender's thread."""
    try:
        while (frame := outbox.get()) is not None:
            channel.sendall(frame)
    except OSError:
        return  # the process ended, which the reader reports


def _keep(source: BinaryIO, log: LogKeeper) -> None:
    """Read the log of the process. This is the third thread."""
    with source:
        log.read(source)
