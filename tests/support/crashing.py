"""An engine whose process dies on certain prompts, with all requests in flight."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import Deliver
from dsmoe_local.engine.types import Prompt, Request, TokenEvent
from support.fake_engine import FakeEngine


@dataclass(frozen=True)
class _Idle:
    def cancel(self) -> None:
        """Do nothing: requests are too short to be cancelled."""


class CrashingEngine(FakeEngine):
    """Echoes prompts one after the other, as soon as `patience` requests wait.

    A prompt for which `kills` is true crashes it: all requests in flight get `error`. The first time that it
    comes there is another one in flight. The next `start` or `encode` loads it again and calls `reload`,
    which may raise.
    """

    def __init__(
        self,
        kills: Callable[[str], bool],
        *,
        patience: int = 1,
        error: EngineError | None = None,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._kills = kills
        self._error = error or EngineCrashError("the engine was killed by SIGSEGV")
        self._reload = reload
        self._patience = patience
        self._queue: queue.SimpleQueue[tuple[Request, Deliver]] = queue.SimpleQueue()
        self._dead = False
        self.in_flight_at_crashes: list[int] = []
        threading.Thread(target=self._work, daemon=True).start()

    def encode(self, prompt: Prompt, **options: Any) -> tuple[int, ...]:
        self._revive()
        return super().encode(prompt, **options)

    def start(self, request: Request, deliver: Deliver) -> _Idle:
        self._revive()
        self._cancelled[request.id] = False
        self._queue.put((request, deliver))
        return _Idle()

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        raise EngineError("batches start requests")

    def _revive(self) -> None:
        if self._dead:
            self._reload()
            self._dead = False

    def _work(self) -> None:
        waiting = [self._queue.get() for _ in range(self._patience)]
        known: set[str] = set()
        while True:
            request, deliver = waiting.pop(0) if waiting else self._queue.get()
            if not self._kills(str(request.prompt)):
                for event in self._generate(request):
                    deliver(event)
                deliver(None)
                continue
            if request.id not in known and not waiting:
                waiting.append(self._queue.get())
            known.add(request.id)
            while not self._queue.empty():
                waiting.append(self._queue.get())
            self._dead = True
            self.in_flight_at_crashes.append(1 + len(waiting))
            for victim in (deliver, *(other for _, other in waiting)):
                victim(self._error)
            waiting.clear()
