"""The engine in a process of its own, held like one in this process: a crash of it becomes an exception.

Imports neither llama.cpp nor numpy. What runs on the other side is `host`'s concern, how both talk `wire`'s,
and the process itself `child`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.process.child import AlreadyOverError, Child
from dsmoe_local.engine.process.log import LogKeeper
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

T = TypeVar("T")

NATIVE = "dsmoe_local.engine.process.native_engine:load"


class EngineClient:
    """A loaded model in a child process. Make it with `EngineClient.load`; close it, or use it as a context
    manager.

    When the child dies, every request in flight ends with EngineCrashError; the next `start`, `submit` or
    `encode` loads the model again in a new child. What observers had seen is lost with the old one.
    """

    def __init__(
        self, options: ModelOptions, stop: threading.Event, log_file: Path | None, factory: str
    ) -> None:
        self._options = options
        self._stop = stop
        self._factory = factory
        self._log = LogKeeper(log_file)
        self._closing = threading.Event()
        # Held while a child is started, so that of several callers one does it.
        self._starting = threading.Lock()
        self._child: Child | None = None
        # Of those who start a request: set if it is cancelled before it is anybody's.
        self._given_up: dict[str, threading.Event] = {}

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
            client._child = client._start_child(listen, threading.Event())
        except BaseException:
            client.close()
            raise
        return client

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._latest().info

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
        given_up = self._given_up[request.id] = threading.Event()
        try:
            ticket = self._ask(lambda child: child.start(request, deliver), given_up)
            if given_up.is_set():
                ticket.cancel()
            return ticket
        finally:
            self._given_up.pop(request.id, None)

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read. Unknown ids are fine. Signal handlers may call it."""
        given_up = self._given_up.get(request_id)
        if given_up is not None:
            given_up.set()
        if self._child is not None:
            self._child.cancel(request_id)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The exact token ids of `prompt`. Raises PromptError, TemplateError."""
        return self._ask(lambda child: child.encode(prompt), threading.Event())

    def observe(self, name: str) -> Observation:
        """What the observer of that name has seen. EngineError if none was loaded, EngineCrashError if it
        died with the process.
        """
        try:
            return self._latest().observe(name)
        except AlreadyOverError as over:
            raise over.failure from None

    def log(self) -> tuple[str, ...]:
        """The child's latest log lines, safe to print; those of a dead one stay until it is replaced."""
        return self._log.lines()

    def close(self) -> None:
        """End all requests and the child, which is killed if it does not leave. Closing twice is fine."""
        self._closing.set()
        with self._starting:
            if self._child is not None:
                self._child.close()
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _latest(self) -> Child:
        if self._child is None or self._closing.is_set():
            raise EngineError("the engine is closed")
        return self._child

    def _ask(self, ask: Callable[[Child], T], given_up: threading.Event) -> T:
        """Ask a living child; once more if it died before it could be asked."""
        try:
            return ask(self._living(given_up))
        except AlreadyOverError:
            pass
        try:
            return ask(self._living(given_up))
        except AlreadyOverError as over:
            raise over.failure from None

    def _living(self, given_up: threading.Event) -> Child:
        """The child; a new one with the model loaded if it died."""
        child = self._latest()
        if child.failure is None:
            return child
        with self._starting:
            child = self._latest()
            if child.failure is None:
                return child
            try:
                self._child = self._start_child(progress.ignore, given_up)
            except InterruptedRunError:
                self._latest()
                raise
            return self._child

    def _start_child(self, listen: progress.Listener, given_up: threading.Event) -> Child:
        ends = (self._stop, self._closing, given_up)
        return Child.load(
            self._options, self._factory, self._log, listen, lambda: any(end.is_set() for end in ends)
        )
