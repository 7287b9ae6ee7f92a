"""The main module of the engine's process: `python -m dsmoe_local.engine.process.host SOCKET PARENT`.

`child` starts it. It serves one engine to one client over an inherited socket, and exits when the client
closes the socket or dies.
"""

from __future__ import annotations

import ctypes
import os
import pkgutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn, Protocol, runtime_checkable

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.progress import Event
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.spawn import set_up_child
from dsmoe_local.engine.types import ModelOptions, Request, TokenEvent

_PR_SET_PDEATHSIG = 1


@runtime_checkable
class _StepEngine(Protocol):
    """An engine with the callbacks of `Engine`."""

    after_step: Callable[[], None] | None
    on_fault: Callable[[BaseException], None] | None


class _Outbox:
    """Sends messages to the client. If `by_step`, events are collected until `flush`."""

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
        """Send an event of a request, or collect it if `by_step` and not `last`."""
        with self._lock:
            self._events.append(event)
        if last or not self.by_step:
            self.flush()

    def flush(self) -> None:
        """Send the collected events as one frame."""
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
        """Drop events that cannot be encoded, such as those with NaN. Their requests end with the error."""
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
            # The client has died.
            os._exit(1)


class _Host:
    """One engine and its client.

    The main thread reads messages, and starts and cancels requests, which does not block. Loading, closing
    and each call run in separate threads, so that a request can be cancelled at any time. The engine's thread
    sends events.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._incoming = channel.makefile("rb")
        self._outbox = _Outbox(channel)
        self._calls: dict[int, threading.Thread] = {}  # the calls that are not answered yet
        self._engine: TextEngine | None = None
        # Protects the requests, which the main thread adds and the engine's thread removes.
        self._lock = threading.Lock()
        self._requests: dict[int, Ticket | None] = {}
        self._stop = threading.Event()
        self._loading: threading.Thread | None = None

    def serve(self) -> None:
        """Handle messages until the client closes the socket or dies. Raises WireError."""
        while (message := wire.receive(self._incoming)) is not None:
            kind, *arguments = message
            try:
                _TAKE[kind](self, *arguments)
            except (LookupError, TypeError) as error:
                raise wire.WireError(f"{str(message)[:80]!r} is not a message") from error

    # Handlers of messages, in the main thread.

    def _take_load(self, factory: str, options: wire.Plain) -> None:
        self._loading = _thread(self._load, factory, options)
        self._loading.start()

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
            if number in self._requests:  # otherwise it has already ended
                self._requests[number] = ticket

    def _take_cancel(self, number: int) -> None:
        ticket = self._requests.get(number)
        if ticket is not None:
            ticket.cancel()

    def _take_call(self, number: int, what: str, argument: wire.Plain) -> None:
        if not self._stop.is_set():
            # Register it first, since the thread removes itself.
            self._calls[number] = thread = _thread(self._answer, number, what, argument)
            thread.start()

    def _take_close(self) -> None:
        self._stop.set()
        _thread(self._close).start()

    # The rest runs in other threads.

    def _load(self, factory: str, options: wire.Plain) -> None:
        try:
            load = pkgutil.resolve_name(factory)
            engine: TextEngine = load(wire.from_plain(ModelOptions, options), self._send_progress, self._stop)
            if isinstance(engine, _StepEngine):
                self._outbox.by_step = True
                engine.after_step = self._outbox.flush
                # If the engine's thread fails, all requests end with the process.
                engine.on_fault = _fail
            self._engine = engine
            self._outbox.send("loaded", wire.to_plain(engine.info))
        except BaseException as error:  # noqa: BLE001 - raised again in the client
            self._outbox.send("failed", _error_to_plain(error))

    def _send_progress(self, event: Event) -> None:
        self._outbox.send("progress", wire.progress_to_plain(event))

    def _deliver(self, number: int, item: TokenEvent | BaseException | None) -> None:
        if isinstance(item, TokenEvent):
            self._outbox.put(wire.event_to_plain(number, item), last=False)
            return
        with self._lock:
            self._requests.pop(number, None)
        self._outbox.put((number, None if item is None else _error_to_plain(item)), last=True)

    def _answer(self, number: int, name: str, arguments: wire.Plain) -> None:
        try:
            checked = wire.arguments_from_plain(name, arguments)  # raises for a name that is not in CALLS
            self._outbox.send("answer", number, wire.to_plain(getattr(self._loaded(), name)(**checked)))
        except BaseException as error:  # noqa: BLE001 - raised again in the client
            self._outbox.send("refusal", number, _error_to_plain(error))
        finally:
            self._calls.pop(number, None)  # no KeyError if a faulty client uses a number twice

    def _close(self) -> None:
        if self._loading is not None:
            self._loading.join()
        if self._engine is not None:
            self._engine.close()
        for thread in list(self._calls.values()):  # their answers must be sent
            thread.join()
        _exit()

    def _loaded(self) -> TextEngine:
        assert self._engine is not None, "the client waits until the model is loaded"
        return self._engine


_TAKE: dict[str, Callable[..., None]] = {
    "load": _Host._take_load,
    "start": _Host._take_start,
    "cancel": _Host._take_cancel,
    "call": _Host._take_call,
    "close": _Host._take_close,
}


def _thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    return threading.Thread(target=work, args=arguments, daemon=True)


def _error_to_plain(error: BaseException) -> wire.Plain:
    """Return an error to send. The traceback of an error that is not a DsmoeError is logged."""
    if not isinstance(error, DsmoeError):
        traceback.print_exception(error)
    return wire.error_to_plain(error)


def _die_with(parent: int) -> None:
    """Let Linux kill this process when the parent dies, even if another process keeps the socket open."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _exit() -> NoReturn:
    """Exit without the interpreter's clean-up, since destructors of native libraries may crash in it."""
    sys.stderr.flush()
    os._exit(0)


def _fail(error: BaseException | None) -> NoReturn:
    """End the process after an error in a thread, since requests would wait for that thread forever."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def main() -> NoReturn:
    """Serve the socket whose descriptor is the first argument; the second is the parent's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    set_up_child()
    _die_with(parent)
    threading.excepthook = lambda failed: _fail(failed.exc_value)
    try:
        _Host(socket.socket(fileno=descriptor)).serve()
    except wire.WireError as error:
        sys.stderr.write(f"the engine's process was sent a malformed message: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - reported by the log and the exit status
        _fail(error)
    _exit()


if __name__ == "__main__":
    main()
