"""Engines for the child process in tests: fakes that block, crash or misbehave on request."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.types import ModelOptions, Observation, Request, TokenEvent
from support.fake_engine import FakeEngine

_FOR_EVER = threading.Event()

FAKE = "support.hosted:fake"
HALTING = "support.hosted:halting"
STEPPING = "support.hosted:stepping"
STUCK = "support.hosted:stuck"
NEVER_LOADED = "support.hosted:never_loaded"
NOT_LOADED = "support.hosted:not_loaded"
DYING_AT_LOAD = "support.hosted:dying_at_load"
BROKEN = "support.hosted:broken"
WAITING = "support.hosted:waiting"
CHOOSY = "support.hosted:choosy"
ONCE = "support.hosted:loading_once"
HALTING_ONCE = "support.hosted:halting_once"
GATED = "support.hosted:gated"
# These are real engines.
PREFILL_HELD = "support.hosted_native:prefill_held"
HELD_AT_FIFTIETH = "support.hosted_native:held_at_fiftieth"


class Hosted(FakeEngine):
    """Obeys the last line of a prompt: `signal SIGSEGV`, `exit 3`, `thread`, `nan`, `print TEXT`. Other lines
    are echoed.

    The observer `modules` reports the imported modules, `loaded` the loaded options. Loading a cache file
    with the text `die` kills the process, saving to one called `half` blocks for ever.
    """

    def __init__(self, gate: Callable[[int], None] = lambda index: None) -> None:
        super().__init__(_obey, gate=gate, n_context=100_000)

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        events = super().submit(request)
        if request.prompt == "nan":
            return (msgspec.structs.replace(event, logprob=math.nan) for event in events)
        return events

    def observe(self, name: str) -> Observation:
        if name == "loaded":
            names = [option.name for option in self.options.observers]
            return {"observers": names, "n_context": self.options.n_context}
        return {"modules": sorted(sys.modules)} if name == "modules" else super().observe(name)

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        if path.name == "half":
            path.write_bytes(b"half a ")
            _FOR_EVER.wait()
        return super().save_cache(path, token_ids, start)

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        if path.read_text() == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
            _FOR_EVER.wait()
        return super().load_cache(path, token_ids)


def _obey(prompt: str) -> str:
    verb, _, argument = prompt.rsplit("\n", 1)[-1].removeprefix("user: ").partition(" ")
    if verb == "signal":
        os.kill(os.getpid(), signal.Signals[argument])
        _FOR_EVER.wait()
    if verb == "thread":
        nothing: dict[str, int] = {}
        threading.Thread(target=lambda: nothing["a bug"]).start()
        _FOR_EVER.wait()
    if verb == "exit":
        os._exit(int(argument))
    if verb == "print":
        print(argument, file=sys.stderr, flush=True)
    return prompt


def fake(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load a fake engine, with some progress."""
    listen(Started("loading", 3))
    listen(Advanced(3, "all"))
    listen(Note(f"context of {options.n_context}"))
    listen(Finished("loading"))
    engine = Hosted()
    engine.options = options
    return engine


def halting(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine whose replies block for ever after three tokens."""

    def halt(index: int) -> None:
        if index == 3:
            _FOR_EVER.wait()

    return Hosted(halt)


class _Waiting(Hosted):
    """The observer `cancelled` and the requests block until a request is cancelled."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        super().__init__(lambda index: self._halt(index))

    def _halt(self, index: int) -> None:
        if index == 3:
            self._ended.wait()

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self._ended.set()

    def observe(self, name: str) -> Observation:
        return {"cancelled": self._ended.wait()} if name == "cancelled" else super().observe(name)


def waiting(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine whose observer waits until a request is cancelled."""
    return _Waiting()


class _Steps(Hosted):
    after_step: Callable[[], None] | None = None
    on_fault: Callable[[BaseException], None] | None = None

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Deliver all tokens in one step, and the end in a second one after `cancel`."""
        *tokens, end = self.submit(request)
        ended = threading.Event()

        def run() -> None:
            assert self.after_step is not None
            for event in tokens:
                deliver(event)
            self.after_step()
            ended.wait()
            deliver(end)
            deliver(None)
            self.after_step()

        threading.Thread(target=run, daemon=True).start()
        return _StepTicket(ended)


class _StepTicket:
    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    def cancel(self) -> None:
        self._ended.set()


def stepping(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine that reports the ends of its steps."""
    return _Steps()


class _Stuck(Hosted):
    def close(self) -> None:
        _FOR_EVER.wait()


def stuck(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine whose `close` blocks."""
    return _Stuck()


def never_loaded(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Report the process id, then load for ever and ignore `stop`."""
    listen(Note(str(os.getpid())))
    _FOR_EVER.wait()
    raise AssertionError


def not_loaded(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Refuse to load."""
    raise OutOfMemoryError("no room", where="here", remedy="less")


def dying_at_load(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Crash while loading, as llama.cpp does for some files."""
    sys.stderr.write("ggml.c:1: GGML_ASSERT(\x1b[31mfine\x1b[0m) failed\n")
    os.abort()


def broken(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Raise an error that is not a DsmoeError."""
    raise KeyError("a bug")


def choosy(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Refuses a context of 1, dies of one of 2, loads one of 3 for ever, and halts with one of 4."""
    if options.n_context == 1:
        raise OutOfMemoryError("no room")
    if options.n_context == 2:
        os.abort()
    if options.n_context == 3:
        listen(Note("for ever"))
        _FOR_EVER.wait()
    return halting(options, listen, stop) if options.n_context == 4 else fake(options, listen, stop)


def loading_once(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Create `options.path` and load. If it exists, refuse to load, or without `n_context` load for ever."""
    try:
        options.path.touch(exist_ok=False)
    except FileExistsError:
        if options.n_context is None:
            listen(Note(str(os.getpid())))
            _FOR_EVER.wait()
        raise OutOfMemoryError("no room any more") from None
    return Hosted()


def halting_once(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine that halts; if a file beside the model shows that there was one, a normal engine."""
    try:
        options.path.with_name("halted").touch(exist_ok=False)
    except FileExistsError:
        return Hosted()
    return halting(options, listen, stop)


def gated(options: ModelOptions, listen: Listener, stop: threading.Event) -> FakeEngine:
    """Load an engine whose replies wait until there is a file `go` beside the model."""
    go = options.path.with_name("go")

    def wait(index: int) -> None:
        while not go.exists():
            _FOR_EVER.wait(0.02)

    return Hosted(wait)
