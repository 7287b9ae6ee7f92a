"""The engine's own process: `python -m dsmoe_local.engine.process.host SOCKET PARENT`, started by `client`.

Serves one engine to one client over an inherited socket: load, start, cancel, calls, close. What the messages
look like is `wire`'s concern. Ends when the client closes the socket or dies.
"""

from __future__ import annotations

import ctypes
import os
import pkgutil
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Protocol, runtime_checkable

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.progress import Event
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.types import (
    ModelOptions,
    Request,
    TextEngine,
    Ticket,
    TokenEvent,
)

_PR_SET_PDEATHSIG = 1
_MOST_CALLS = 64  # at once; one more waits for another to be answered


@runtime_checkable
class _StepEngine(Protocol):
    """An engine that calls back when the events of a step are delivered."""

    after_step: Callable[[], None] | None
    on_fault: Callable[[BaseException], None] | None


class _Outbox:
    """Messages to the client. Events wait for the end of the engine's step, if the engine reports it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._events: list[wire.Plain] = []
        self._unsendable: dict[int, wire.Plain] = {}
        self.by_step = False

    def send(self, *message: wire.Plain) -> None:
        """Send one message at once."""
        frame = wire.pack(message)
        with self._lock:
            self._write(frame)

    def put(self, event: wire.Plain, *, last: bool) -> None:
        """Send an event of a request, together with those of the same step."""
        with self._lock:
            self._events.append(event)
        if last or not self.by_step:
            self.flush()

    def flush(self) -> None:
        """Send the events so far as one frame."""
        with self._lock:
            events, self._events = self._events, []
            if not events:
                return
            if self._unsendable:
                events = self._sendable(events)
            try:
                frame = wire.pack(("events", events))
            except EngineError:
                frame = wire.pack(("events", self._sendable(events)))
            self._write(frame)

    def _sendable(self, events: list[wire.Plain]) -> list[wire.Plain]:
        """Drop the events that cannot be sent (a number is NaN); their requests end with that error."""
        sendable: list[wire.Plain] = []
        for event in events:
            number = event[0]
            if len(event) == wire.END_LENGTH:
                sendable.append((number, self._unsendable.pop(number, event[1])))
                continue
            try:
                wire.pack(event)
                sendable.append(event)
            except EngineError as error:
                self._unsendable[number] = wire.error_to_plain(error)
        return sendable

    def _write(self, frame: bytes) -> None:
        try:
            self._channel.sendall(frame)
        except OSError:
            # The client is gone.
            os._exit(1)


class _Host:
    """One engine and its client.

    The main thread reads the messages; it starts and cancels requests, which never waits. Loading, closing
    and calls, some of which wait for the end of a step, have threads of their own, so that a cancellation is
    taken at any time. Events come from the engine's thread.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._incoming = channel.makefile("rb")
        self._outbox = _Outbox(channel)
        self._calls = ThreadPoolExecutor(_MOST_CALLS, "dsmoe-call")
        self._engine: TextEngine | None = None
        # Guards the requests, which the main thread starts and the engine's thread ends.
        self._lock = threading.Lock()
        self._requests: dict[int, Ticket | None] = {}
        self._stop = threading.Event()
        self._loading: threading.Thread | None = None

    def serve(self) -> None:
        """Until the client closes, or is gone."""
        while (message := wire.receive(self._incoming)) is not None:
            kind, *arguments = message
            try:
                _TAKE[kind](self, *arguments)
            except (LookupError, TypeError) as error:
                raise wire.WireError(f"{str(message)[:80]!r} is no message") from error

    # Messages of the client, handled in the main thread.

    def _take_load(self, factory: str, options: wire.Plain) -> None:
        self._loading = _start_thread(self._load, factory, options)

    def _take_start(self, number: int, request: wire.Plain) -> None:
        wire.from_plain(int, number)
        self._requests[number] = None
        try:
            ticket = self._loaded().start(
                wire.from_plain(Request, request), lambda item: self._deliver(number, item)
            )
        except BaseException as error:  # noqa: BLE001 - raised again in the client
            self._deliver(number, error)
            return
        with self._lock:
            if number in self._requests:  # else it is over
                self._requests[number] = ticket

    def _take_cancel(self, number: int) -> None:
        ticket = self._requests.get(number)
        if ticket is not None:
            ticket.cancel()

    def _take_call(self, number: int, what: str, argument: wire.Plain) -> None:
        if not self._stop.is_set():
            self._calls.submit(self._answer, number, what, argument)

    def _take_close(self) -> None:
        self._stop.set()
        _start_thread(self._close)

    # The rest runs in other threads.

    def _load(self, factory: str, options: wire.Plain) -> None:
        try:
            load = pkgutil.resolve_name(factory)
            engine: TextEngine = load(wire.from_plain(ModelOptions, options), self._tell_progress, self._stop)
            if isinstance(engine, _StepEngine):
                self._outbox.by_step = True
                engine.after_step = self._outbox.flush
                # No request is to blame: all of them end with the process.
                engine.on_fault = _fail
            self._engine = engine
            self._outbox.send("loaded", wire.to_plain(engine.info))
        except BaseException as error:  # noqa: BLE001 - raised again in the client
            self._outbox.send("failed", _crossing(error))

    def _tell_progress(self, event: Event) -> None:
        self._outbox.send("progress", wire.progress_to_plain(event))

    def _deliver(self, number: int, item: TokenEvent | BaseException | None) -> None:
        if isinstance(item, TokenEvent):
            self._outbox.put(wire.event_to_plain(number, item), last=False)
            return
        with self._lock:
            self._requests.pop(number, None)
        self._outbox.put((number, None if item is None else _crossing(item)), last=True)

    def _answer(self, number: int, name: str, arguments: wire.Plain) -> None:
        try:
            known = wire.arguments_from_plain(name, arguments)  # raises for a name that is not in the table
            self._outbox.send("answer", number, wire.to_plain(getattr(self._loaded(), name)(**known)))
        except BaseException as error:  # noqa: BLE001 - raised again in the client
            self._outbox.send("refusal", number, _crossing(error))

    def _close(self) -> None:
        if self._loading is not None:
            self._loading.join()
        if self._engine is not None:
            self._engine.close()
        self._calls.shutdown()  # what they were told is to be sent
        _leave()

    def _loaded(self) -> TextEngine:
        assert self._engine is not None, "the client waits for the model before it asks for more"
        return self._engine


_TAKE: dict[str, Callable[..., None]] = {
    "load": _Host._take_load,
    "start": _Host._take_start,
    "cancel": _Host._take_cancel,
    "call": _Host._take_call,
    "close": _Host._take_close,
}


def _start_thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _crossing(error: BaseException) -> wire.Plain:
    """An error for the wire. The traceback of one that is not a DsmoeError goes to the log."""
    if not isinstance(error, DsmoeError):
        traceback.print_exception(error)
    return wire.error_to_plain(error)


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, even where another process keeps our socket open."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave() -> NoReturn:
    """Exit. Not the interpreter's own way out: destructors of native libraries may crash on it."""
    sys.stderr.flush()
    os._exit(0)


def _fail(error: BaseException | None) -> NoReturn:
    """End the process of a thread's failure: without that thread, requests would wait for ever."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def main() -> NoReturn:
    """Serve the socket whose descriptor is the first argument; the second is the parent's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    # Ctrl-C is the client's to judge.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    # A dump of gigabytes of weights would hold up the news of a crash.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    threading.excepthook = lambda failed: _fail(failed.exc_value)
    try:
        _Host(socket.socket(fileno=descriptor)).serve()
    except wire.WireError as error:
        sys.stderr.write(f"the engine's process was sent what it cannot understand: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - told by the log and the exit status
        _fail(error)
    _leave()


if __name__ == "__main__":
    main()
