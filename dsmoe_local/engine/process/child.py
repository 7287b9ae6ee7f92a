"""The client's side of one child process with one engine: its start, its messages, its end.

Three threads: one starts the process, reads and delivers; one sends, so that no caller can be interrupted in
the middle of a frame; one reads the log.
"""

from __future__ import annotations

import copy
import itertools
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.log import LogKeeper
from dsmoe_local.engine.process.spawn import crash, spawn
from dsmoe_local.engine.types import (
    Deliver,
    ModelInfo,
    ModelOptions,
    Request,
    TextEngine,
    TokenEvent,
)

_GRACE = 1.0  # seconds that a child has to leave
_PATIENCE = 5.0  # seconds that a killed one may take; after that it is left to the system
POLL = 0.05  # seconds between two looks at whether a load is to stop


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A call in flight: the type of its answer, and where that, or an error, is put."""

    kind: Any
    answer: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


def interrupted_load() -> InterruptedRunError:
    """Return the error for a load that was given up."""
    return InterruptedRunError("loading was interrupted")


class AlreadyOverError(Exception):
    """The child had ended before it was asked; `failure` says why."""

    def __init__(self, failure: EngineError) -> None:
        super().__init__(str(failure))
        self.failure = failure


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A request in flight; the caller's Ticket."""

    child: Child
    number: int
    request_id: str
    deliver: Deliver

    def cancel(self) -> None:
        self.child.cancel_number(self.number)


class Child:
    """A process with a loaded model. `failure` is set once the process has ended, and says why.
    The next process is loaded with `options`.
    """

    def __init__(self, options: ModelOptions, log: LogKeeper, listen: progress.Listener) -> None:
        self.options = options
        self.failure: EngineError | None = None
        self.info: ModelInfo
        self._log = log
        self._listen = listen
        self._verdict: EngineError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned = threading.Event()
        self._loaded = threading.Event()
        self._load_failure: BaseException | None = None
        # Guards what is in flight between those who ask and the reader.
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._by_id: dict[str, _Running] = {}
        self._deaf: set[int] = set()  # requests whose receiver failed: events of them may still come
        self._calls: dict[int, _Asked] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
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
        """Start a process and load the model there. It is killed once `stopped`, or if the wait is
        interrupted.
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
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    # What a caller may ask, from any thread.

    def start(self, request: Request, deliver: Deliver) -> _Running:
        """See TextEngine. AlreadyOverError if there is nobody to ask."""
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
        """See TextEngine. Takes no lock: the signal handler that calls it may have interrupted `start`."""
        running = self._by_id.get(request_id)
        if running is not None:
            running.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests. Takes no lock, as `cancel`."""
        for running in list(self._running.values()):
            running.cancel()

    def cancel_number(self, number: int) -> None:
        """Cancel a request, if it is not over."""
        if number in self._running:
            self._outbox.put(wire.pack(("cancel", number)))

    def call(
        self, method: Callable[Concatenate[TextEngine, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a method of TextEngine that `wire.CALLS` has. AlreadyOverError if there is nobody to ask."""
        name = method.__name__
        arguments = dict(zip(wire.CALLS[name], args, strict=False)) | kwargs
        number = next(self._numbers)
        frame = wire.pack(("call", number, name, wire.to_plain(arguments)))
        asked = _Asked(wire.CALLS[name]["return"])
        with self._lock:
            self._check_alive()
            self._calls[number] = asked
        self._outbox.put(frame)
        value = asked.answer.get()
        if isinstance(value, BaseException):
            raise value
        answer: T = value
        return answer

    def _check_alive(self) -> None:
        if self.over is not None:
            raise AlreadyOverError(copy.copy(self.over))

    # Its end.

    @property
    def over(self) -> EngineError | None:
        """Why the process takes no more calls; None while it does."""
        return self.failure or self._verdict

    def condemn(self, verdict: EngineError) -> None:
        """Kill the process without waiting; what is in flight ends with `verdict`. Takes no lock: signal
        handlers may call it.
        """
        self._verdict = self._verdict or verdict
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Ask the process to end its requests and exit; kill it if it does not."""
        self._verdict = self._verdict or EngineError("the engine is closed")
        self._outbox.put(wire.pack(("close",)))
        self._join(_GRACE)
        self.kill()

    def kill(self) -> None:
        """Kill the process, if it has not ended, and reap it."""
        self._verdict = self._verdict or EngineError("the engine is closed")
        if self._reader.ident is None:
            return  # interrupted before it began
        self._spawned.wait()
        if self._process is not None:
            self._process.kill()
        self._join(_PATIENCE)

    def _join(self, seconds: float) -> None:
        if threading.current_thread() is not self._reader:
            self._reader.join(seconds)

    # The reader's thread.

    def _run(self) -> None:
        """Start the process, which Linux kills when its starting thread ends; read until it has ended."""
        try:
            self._process, channel = spawn()
        except BaseException as error:  # noqa: BLE001 - raised again by `load`
            self._load_failure = error
            self._loaded.set()
            return
        finally:
            self._spawned.set()
        try:
            failure = self._attend(self._process, channel)
        except BaseException as error:  # noqa: BLE001 - told to all who would else wait for ever
            self._reap(self._process, at_once=True)
            self._outbox.put(None)
            what = f"internal error beside the engine's process: {type(error).__name__}: {error}"
            failure = self._verdict or _broken(what, error, self._log.lines(), "try again")
        self._end(failure)

    def _attend(self, process: subprocess.Popen[bytes], channel: socket.socket) -> EngineError:
        """Read and deliver until the process has ended. Returns why it did."""
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
            garbled = self._read(source)
            status = self._reap(process, at_once=garbled is not None)
            self._outbox.put(None)
            for thread in (send, keep):
                thread.join(_GRACE)
        return self._reason(status, garbled)

    def _read(self, source: wire.Source) -> Exception | None:
        """Handle messages until the end. Returns the error of a message that cannot be understood."""
        try:
            while (message := wire.receive(source)) is not None:
                kind, *arguments = message
                _TAKE[kind](self, *arguments)
        except (wire.WireError, LookupError, TypeError, ValueError) as error:
            return error
        except OSError:
            # The connection was reset: what was sent to it was never read.
            return None
        return None

    def _reap(self, process: subprocess.Popen[bytes], *, at_once: bool) -> int:
        try:
            if not at_once:
                return process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            # It closed the socket and goes on.
            pass
        process.kill()
        return process.wait()

    def _reason(self, status: int, garbled: Exception | None) -> EngineError:
        if self._verdict is not None:
            return self._verdict
        log = self._log.lines()
        if garbled is None:
            return crash(status, log, loading=not self._loaded.is_set())
        return _broken("the engine's process sent what cannot be understood", garbled, log)

    def _end(self, failure: EngineError) -> None:
        """Deliver `failure` to all requests and calls in flight."""
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
            self._hand(request, copy.copy(failure))
        for asked in calls:
            asked.answer.put(copy.copy(failure))

    def _take_progress(self, told: wire.Plain) -> None:
        event = wire.progress_from_plain(told)
        try:
            self._listen(event)
        except Exception as error:  # noqa: BLE001 - the listener's own, raised again by `load`
            self._load_failure = error
            self._loaded.set()

    def _take_loaded(self, info: wire.Plain) -> None:
        self.info = wire.from_plain(ModelInfo, info)
        self._loaded.set()

    def _take_failed(self, error: wire.Plain) -> None:
        self._load_failure = wire.error_from_plain(error)
        self._loaded.set()

    def _take_answer(self, number: int, value: wire.Plain) -> None:
        # What cannot be understood stays in flight, and ends with the process.
        answer: object = wire.from_plain(self._calls[number].kind, value)
        self._answer(number, answer)

    def _take_refusal(self, number: int, error: wire.Plain) -> None:
        self._answer(number, wire.error_from_plain(error))

    def _answer(self, number: int, value: object) -> None:
        with self._lock:
            asked = self._calls.pop(number)
        asked.answer.put(value)

    def _take_events(self, events: list[wire.Plain]) -> None:
        for event in events:
            number = event[0]
            if number in self._deaf:
                continue
            running = self._running[number]
            if len(event) > wire.END_LENGTH:
                self._hand(running, wire.event_from_plain(running.request_id, event))
            else:
                end = None if event[1] is None else wire.error_from_plain(event[1])
                # Forgotten first: the receiver may start the same id again.
                self._forget(running)
                self._hand(running, end)

    def _forget(self, running: _Running) -> None:
        with self._lock:
            del self._running[running.number]
            del self._by_id[running.request_id]

    def _hand(self, running: _Running, item: TokenEvent | BaseException | None) -> None:
        """Deliver. A receiver that fails loses its own request, nobody else's."""
        try:
            running.deliver(item)
        except Exception:  # noqa: BLE001 - reported as any thread's
            running.cancel()
            if running.number in self._running:
                self._deaf.add(running.number)
                self._forget(running)
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_TAKE: dict[str, Callable[..., None]] = {
    "progress": Child._take_progress,
    "loaded": Child._take_loaded,
    "failed": Child._take_failed,
    "answer": Child._take_answer,
    "refusal": Child._take_refusal,
    "events": Child._take_events,
}


def _broken(what: str, cause: BaseException, log: tuple[str, ...], remedy: str = "") -> EngineCrashError:
    """The error for requests whose process had to be killed."""
    error = EngineCrashError(what, log=log, remedy=remedy)
    error.__cause__ = cause
    return error


def _send(channel: socket.socket, outbox: queue.SimpleQueue[bytes | None]) -> None:
    """The sender's thread."""
    try:
        while (frame := outbox.get()) is not None:
            channel.sendall(frame)
    except OSError:
        return  # nobody reads there any more: the reader says why


def _keep(source: BinaryIO, log: LogKeeper) -> None:
    """The log's thread."""
    with source:
        log.read(source)
