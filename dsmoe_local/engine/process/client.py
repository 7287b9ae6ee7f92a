"""The engine in a process of its own, held like one in this process: a crash of it becomes an exception.

Imports neither llama.cpp nor numpy. `child` is one process, `host` runs in it, `wire` is their protocol.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, EngineKilledError
from dsmoe_local.engine.process.child import POLL, AlreadyOverError, Child, interrupted_load
from dsmoe_local.engine.process.log import LogKeeper
from dsmoe_local.engine.streaming import stream
from dsmoe_local.engine.types import (
    Deliver,
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TextEngine,
    Ticket,
    TokenEvent,
)

P = ParamSpec("P")
T = TypeVar("T")

NATIVE = "dsmoe_local.engine.process.native_engine:load"


@dataclass(slots=True, eq=False)
class _Call:
    """A call that may load the model. `given_up`: it must not load, or must stop. No Event: a signal handler
    that sets it may have interrupted `Event.set`, which holds a lock.
    """

    given_up: bool = False

    def check(self) -> None:
        """InterruptedRunError if it is given up."""
        if self.given_up:
            raise interrupted_load()


class EngineClient:
    """A loaded model in a child process. Make it with `EngineClient.load`; close it, or use it as a context
    manager.

    When the child dies, every request in flight ends with EngineCrashError; the next call that needs one (see
    ReloadableEngine) loads the model again in a new child. What observers had seen is lost with the old one.
    """

    def __init__(
        self, options: ModelOptions, stop: threading.Event, log_file: Path | None, factory: str
    ) -> None:
        self._stop = stop
        self._factory = factory
        self._log = LogKeeper(log_file)
        self._closing = threading.Event()
        # Held while a child is started, so that of several callers one does it.
        self._starting = threading.Lock()
        self._child: Child | None = None
        self._crashes = 0
        # All that are in progress, and by the request's id those that start one.
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
        """See `Engine.load`; EngineCrashError if the process dies of the file.

        `stop` ends later loads, after a crash, too. `listen` hears the progress from a thread of the
        client's. `log_file` takes all lines of the child's log. `factory` names the function that loads the
        engine there, as `module:function` [NATIVE].
        """
        client = cls(options, stop or threading.Event(), log_file, factory or NATIVE)
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
        """What is loaded, and how (see ReloadableEngine)."""
        assert self._child is not None
        return self._child.options

    @property
    def alive(self) -> bool:
        """Whether the process is there (see ReloadableEngine)."""
        child = self._child
        return child is not None and child.over is None and not self._closing.is_set()

    @property
    def crashes(self) -> int:
        """How often a process has died and another took its place."""
        return self._crashes

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._latest().pid

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply (see TextEngine)."""
        return stream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Generate without waiting (see TextEngine), except for the model after a crash; InterruptedRunError
        if the request is cancelled, or `load`'s `stop` set, meanwhile. What the engine refuses is delivered,
        not raised.
        """
        with self._call() as call:
            self._starts[request.id] = call
            try:
                ticket = self._ask(lambda child: child.start(request, deliver), call)
                if call.given_up:
                    ticket.cancel()
                return ticket
            finally:
                self._starts.pop(request.id, None)

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read. Unknown ids are fine. Signal handlers may call it."""
        call = self._starts.get(request_id)
        if call is not None:
            call.given_up = True
        if self._child is not None:
            self._child.cancel(request_id)

    def cancel_all(self) -> None:
        """End all requests, and give up every load that a call waits for (see ReloadableEngine)."""
        self._give_up_all()
        if self._child is not None:
            self._child.cancel_all()

    def encode(self, prompt: Prompt, *, continue_final_message: bool = False) -> tuple[int, ...]:
        """The exact token ids of `prompt` (see TextEngine). Raises PromptError, TemplateError."""
        return self._ask_engine(TextEngine.encode, prompt, continue_final_message=continue_final_message)

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token's own text. PromptError for an id that the vocabulary does not have."""
        return self._ask_engine(TextEngine.decode, tuple(token_ids))

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write what the KV cache holds of these tokens (see TextEngine); 0 if it died with the process.
        EngineError if the engine is closed meanwhile.
        """
        child = self._latest()
        if os.path.lexists(path):
            return 0
        try:
            return child.call(TextEngine.save_cache, path.absolute(), token_ids, start)
        except AlreadyOverError:
            return 0
        except EngineError as error:
            # Whoever wrote it is gone, perhaps in the middle.
            path.unlink(missing_ok=True)
            if isinstance(error, EngineCrashError):
                return 0
            raise

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Make the KV cache hold what such a file does (see TextEngine); 0 if the process dies of it."""
        try:
            return self._ask_engine(TextEngine.load_cache, path.absolute(), token_ids)
        except EngineKilledError:
            raise
        except EngineCrashError:
            return 0

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers (see TextEngine), also of the processes to come."""

        def exchange(child: Child) -> None:
            before = child.options
            # At once, so that who finds the process dead right after the exchange loads these.
            child.options = replace(before, observers=options)
            try:
                child.call(TextEngine.set_observers, options)
            except BaseException:
                child.options = before
                raise

        with self._call() as call:
            self._ask(exchange, call)

    def observe(self, name: str) -> Observation:
        """What the observer of that name has seen. EngineError if none was loaded, EngineCrashError if it
        died with the process.
        """
        try:
            return self._latest().call(TextEngine.observe, name)
        except AlreadyOverError as over:
            raise over.failure from None

    def log(self) -> tuple[str, ...]:
        """The child's latest log lines, safe to print; those of a dead one stay until it is replaced."""
        return self._log.lines()

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """Load another model, or the same one otherwise (see ReloadableEngine)."""
        with self._call() as call, self._turn_to_start(call):
            self._latest().close()
            # Its place stays taken: without another one, the next request finds it over.
            self._child = self._start_child(options, listen, call, stop)

    def kill(self) -> None:
        """End the process at once, also one that hangs, and every load (see ReloadableEngine)."""
        self._give_up_all()
        if self._child is not None:
            self._child.condemn(
                EngineKilledError(
                    "the engine was ended, since it did not answer",
                    remedy="the next message loads the model again",
                )
            )

    def close(self) -> None:
        """End all requests and the child, which is killed if it does not leave. Closing twice is fine."""
        self._closing.set()
        with self._starting, ExitStack() as last_to_first:
            last_to_first.callback(self._log.close)
            if self._child is not None:
                last_to_first.callback(self._child.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _latest(self) -> Child:
        if self._child is None or self._closing.is_set():
            raise EngineError("the engine is closed")
        return self._child

    @contextmanager
    def _call(self) -> Iterator[_Call]:
        """A call that may load the model first."""
        number, call = next(self._numbers), _Call()
        self._calls[number] = call
        try:
            yield call
        finally:
            del self._calls[number]

    def _give_up_all(self) -> None:
        """Takes no lock: the signal handler that wants it may have interrupted the one who holds it."""
        for call in list(self._calls.values()):
            call.given_up = True

    @contextmanager
    def _turn_to_start(self, call: _Call) -> Iterator[None]:
        """Hold the right to start a child; InterruptedRunError if the call is given up while others do."""
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
        """Call a method of TextEngine. The model is loaded again first if its process has died."""
        with self._call() as call:
            return self._ask(lambda child: child.call(method, *args, **kwargs), call)

    def _ask(self, ask: Callable[[Child], T], call: _Call) -> T:
        """Ask a living child; once more if it died before it could be asked."""
        try:
            return ask(self._living(call))
        except AlreadyOverError:
            pass
        try:
            return ask(self._living(call))
        except AlreadyOverError as over:
            raise over.failure from None

    def _living(self, call: _Call) -> Child:
        """The child; a new one with the model loaded if it died."""
        child = self._latest()
        if child.over is None:
            return child
        with self._turn_to_start(call):
            child = self._latest()
            if child.over is None:
                return child
            # Two models at once may be more than the memory holds.
            child.kill()
            try:
                self._child = self._start_child(child.options, progress.ignore, call)
            except InterruptedRunError:
                self._latest()
                raise
            self._crashes += isinstance(child.over, EngineCrashError)
            return self._child

    def _start_child(
        self,
        options: ModelOptions,
        listen: progress.Listener,
        call: _Call,
        stop: threading.Event | None = None,
    ) -> Child:
        ends = [self._stop, self._closing, *([] if stop is None else [stop])]

        def stopped() -> bool:
            return call.given_up or any(end.is_set() for end in ends)

        return Child.load(options, self._factory, self._log, listen, stopped)
