"""An engine in a child process. A crash of the process becomes an exception.

It imports neither llama.cpp nor numpy. `child` manages one process, `host` runs in it, `wire` is the
protocol.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, EngineKilledError
from dsmoe_local.engine.event_stream import EventStream
from dsmoe_local.engine.interface import Deliver, TextEngine, Ticket
from dsmoe_local.engine.process.child import POLL, Child, ChildEndedError, interrupted_load
from dsmoe_local.engine.process.log import LogKeeper
from dsmoe_local.engine.types import (
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TokenEvent,
    Tool,
)

P = ParamSpec("P")
T = TypeVar("T")

NATIVE = "dsmoe_local.engine.engine:load_with_log"


@dataclass(slots=True, eq=False)
class _Call:
    """A call that may have to load the model first. `cancelled`: stop that load, or do not begin it.

    It is not an Event: a signal handler sets it, and `Event.set` takes a lock that the interrupted code may
    hold.
    """

    cancelled: bool = False

    def check(self) -> None:
        """Raise InterruptedRunError if the call was cancelled."""
        if self.cancelled:
            raise interrupted_load()


class EngineClient:
    """A loaded model in a child process. Create it with `EngineClient.load` and close it, or use it as a
    context manager.

    When the child dies, all running requests end with EngineCrashError, and the data of observers are lost.
    The next call that needs a child (see ReloadableEngine) loads the model in a new one.
    """

    def __init__(self, stop: threading.Event, log_file: Path | None, factory: str) -> None:
        self._process = os.getpid()
        self._stop = stop
        self._factory = factory
        self._log = LogKeeper(log_file)
        self._closing = threading.Event()
        # Held while a child is started, so that only one caller does it.
        self._starting = threading.Lock()
        self._child: Child | None = None
        self._crashes = 0
        # `_calls` are all calls in progress; `_starts` those that start a request, by its id.
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._starts: dict[str, _Call] = {}

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
        *,
        log_file: Path | None = None,
        factory: str | None = None,
    ) -> Self:
        """Load a model (see `Engine.load`). Also raises EngineCrashError if the process dies while it loads.

        `stop` also stops later loads, after a crash. `listen` is called in a thread of the client. All lines
        of the child's log are appended to `log_file`. `factory` names the function that loads the engine in
        the child, as `module:function`; the default is NATIVE.
        """
        client = cls(stop or threading.Event(), log_file, factory or NATIVE)
        try:
            client._child = client._start_child(options, listen, _Call())
        except BaseException:
            client.close()
            raise
        return client

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._latest().info

    @property
    def options(self) -> ModelOptions:
        """The options of the loaded model (see ReloadableEngine)."""
        assert self._child is not None
        return self._child.options

    @property
    def alive(self) -> bool:
        """True if the process is running (see ReloadableEngine)."""
        child = self._own_child()
        return child is not None and child.end_reason is None and not self._closing.is_set()

    @property
    def crashes(self) -> int:
        """The number of processes that crashed or were killed and have been replaced."""
        return self._crashes

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._latest().pid

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply (see TextEngine)."""
        return EventStream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Start to generate a reply (see TextEngine). Only waits for the load after a crash.

        Raises InterruptedRunError if, during that load, the request is cancelled or the `stop` of `load` is
        set. Errors of the engine are delivered.
        """
        with self._call() as call:
            self._starts[request.id] = call
            try:
                ticket = self._ask(lambda child: child.start(request, deliver), call)
                if call.cancelled:
                    ticket.cancel()
                return ticket
            finally:
                self._starts.pop(request.id, None)

    def cancel(self, request_id: str) -> None:
        """End a request (see TextEngine). Signal handlers may call it."""
        call = self._starts.get(request_id)
        if call is not None:
            call.cancelled = True
        if (child := self._own_child()) is not None:
            child.cancel(request_id)

    def cancel_all(self) -> None:
        """Cancel all requests and loads (see ReloadableEngine)."""
        self._cancel_calls()
        if (child := self._own_child()) is not None:
            child.cancel_all()

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: tuple[Tool, ...] = (),
    ) -> tuple[int, ...]:
        """Return the token ids of `prompt` (see TextEngine)."""
        return self._ask_engine(
            TextEngine.encode,
            prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
        )

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token's text (see TextEngine)."""
        return self._ask_engine(TextEngine.decode, tuple(token_ids))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sequence of tokens (see TextEngine)."""
        return self._ask_engine(TextEngine.detokenize, tuple(token_ids))

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write a prefix of these tokens from the KV cache to a file (see TextEngine).

        Returns 0 if the process has died. Raises EngineError if the engine is closed in the meantime.
        """
        child = self._latest()
        if os.path.lexists(path):
            return 0
        try:
            return child.call(TextEngine.save_cache, path.absolute(), token_ids, start)
        except ChildEndedError:
            return 0
        except EngineError as error:
            # The process may have died while it wrote the file.
            path.unlink(missing_ok=True)
            if isinstance(error, EngineCrashError):
                return 0
            raise

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Load a file of `save_cache` (see TextEngine). Returns 0 if this crashes the process."""
        try:
            return self._ask_engine(TextEngine.load_cache, path.absolute(), token_ids)
        except EngineKilledError:
            raise
        except EngineCrashError:
            return 0

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers (see TextEngine), also for later processes."""

        def exchange(child: Child) -> None:
            before = child.options
            # Set before the call: if the process dies right after it, the next one must load these.
            child.options = replace(before, observers=options)
            try:
                child.call(TextEngine.set_observers, options)
            except BaseException:
                child.options = before
                raise

        with self._call() as call:
            self._ask(exchange, call)

    def observe(self, name: str) -> Observation:
        """Return the summary of an observer (see TextEngine).

        Raises EngineCrashError if the process has died.
        """
        try:
            return self._latest().call(TextEngine.observe, name)
        except ChildEndedError as ended:
            raise ended.failure from None

    def log(self) -> tuple[str, ...]:
        """Return the child's latest log lines, safe to print. They are kept until the child is replaced."""
        return self._log.lines()

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """Load another model, or the same one with other options (see ReloadableEngine)."""
        with self._call() as call, self._start_lock(call):
            self._latest().close()
            # If the new load fails, the closed child stays, and the next request loads its model again.
            self._child = self._start_child(options, listen, call, stop)

    def kill(self) -> None:
        """Kill the process and cancel all loads (see ReloadableEngine)."""
        self._cancel_calls()
        if (child := self._own_child()) is not None:
            child.kill_for(
                EngineKilledError(
                    "the engine was killed because it did not answer",
                    remedy="the next message loads the model again",
                )
            )

    def close(self) -> None:
        """End all requests and the child. A child that does not exit is killed. May be called twice.

        Does nothing in a forked process: the model is that of its parent.
        """
        if not self._is_here():
            return
        self._closing.set()
        with self._starting, ExitStack() as last_to_first:
            last_to_first.callback(self._log.close)
            if self._child is not None:
                last_to_first.callback(self._child.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_here(self) -> bool:
        """True in the process that has loaded the model. A fork shares its socket, but has no threads."""
        return os.getpid() == self._process

    def _check_process(self) -> None:
        """Raise EngineError in a forked process."""
        if not self._is_here():
            raise EngineError(
                "the model was opened in another process", remedy="open it in the process that uses it"
            )

    def _own_child(self) -> Child | None:
        """Return the child; None if there is none, or in a forked process."""
        return self._child if self._is_here() else None

    def _latest(self) -> Child:
        self._check_process()
        if self._child is None or self._closing.is_set():
            raise EngineError("the engine is closed")
        return self._child

    @contextmanager
    def _call(self) -> Iterator[_Call]:
        """Register a call that may have to load the model first."""
        number, call = next(self._numbers), _Call()
        self._calls[number] = call
        try:
            yield call
        finally:
            del self._calls[number]

    def _cancel_calls(self) -> None:
        """Cancel the loads of all calls. Takes no lock, since signal handlers call it."""
        for call in list(self._calls.values()):
            call.cancelled = True

    @contextmanager
    def _start_lock(self, call: _Call) -> Iterator[None]:
        """Hold the lock for starting a child. Raises InterruptedRunError if `call` is cancelled meanwhile."""
        self._check_process()
        while not self._starting.acquire(timeout=POLL):
            call.check()
        try:
            call.check()
            yield
        finally:
            self._starting.release()

    def _ask_engine(
        self, method: Callable[Concatenate[TextEngine, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a method of TextEngine, after a new load if the process has died."""
        with self._call() as call:
            return self._ask(lambda child: child.call(method, *args, **kwargs), call)

    def _ask(self, ask: Callable[[Child], T], call: _Call) -> T:
        """Pass a running child to `ask`. If it dies before the call is sent, try once more with a new one."""
        try:
            return ask(self._running_child(call))
        except ChildEndedError:
            pass
        try:
            return ask(self._running_child(call))
        except ChildEndedError as ended:
            raise ended.failure from None

    def _running_child(self, call: _Call) -> Child:
        """Return the child, or a new one with the same options if it has died."""
        child = self._latest()
        if child.end_reason is None:
            return child
        with self._start_lock(call):
            child = self._latest()
            if child.end_reason is None:
                return child
            # Two models at once may exceed the memory.
            child.kill()
            try:
                self._child = self._start_child(child.options, progress.ignore, call)
            except InterruptedRunError:
                self._latest()
                raise
            self._crashes += isinstance(child.end_reason, EngineCrashError)
            return self._child

    def _start_child(
        self,
        options: ModelOptions,
        listen: progress.Listener,
        call: _Call,
        stop: threading.Event | None = None,
    ) -> Child:
        events = [self._stop, self._closing, *([] if stop is None else [stop])]

        def stopped() -> bool:
            return call.cancelled or any(event.is_set() for event in events)

        return Child.load(options, self._factory, self._log, listen, stopped)
