"""What a running server knows: its model, its running requests, and whether it is shutting down."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsmoe_local.base.text import count, safe_line
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.engine.types import Request
from dsmoe_local.protocol.replies import ReplyBuilder, reply_lead
from dsmoe_local.serve.errors import ServeError, shutting_down, too_slow
from dsmoe_local.serve.generation import Generation, Mailbox
from dsmoe_local.serve.metrics import Metrics
from dsmoe_local.serve.options import ServeOptions

Log: TypeAlias = Callable[[str], None]
"""Takes one line of the log, safe to print."""

_THREADS = 4  # for calls of the engine that are not replies
_LOGGED = 100_000  # characters of a body
_LONGEST_WAIT = 60  # seconds, the most that Retry-After says


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model under the name that requests use. `lead` is that of `reply_lead`."""

    name: str
    engine: ReloadableEngine
    lead: str
    created: int


class ServerState:
    """Created in the event loop of the server, closed by it."""

    def __init__(self, name: str, engine: ReloadableEngine, options: ServeOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.model = ServedModel(name, engine, reply_lead(engine), int(time.time()))
        self.draining = False
        self._running: set[Generation] = set()
        self._mean_seconds = 1.0
        self.metrics = Metrics(self)
        n_threads = options.max_queued + engine.info.n_parallel + _THREADS
        self.executor = ThreadPoolExecutor(n_threads, thread_name_prefix="dsmoe-serve")
        self.mailbox = Mailbox(asyncio.get_running_loop())

    @property
    def n_active(self) -> int:
        """Replies that run or wait."""
        return sum(generation.request.n for generation in self._running)

    @property
    def n_queued(self) -> int:
        """Replies that wait for a slot."""
        return max(0, self.n_active - self.model.engine.info.n_parallel)

    def log_body(self, body: Mapping[str, Any]) -> None:
        """Log the body of a request, if the user asked for it."""
        if self.options.log_text:
            self.log(safe_line(json.dumps(body, ensure_ascii=False), _LOGGED))

    def find(self, name: object) -> ServedModel:
        """Return the model that a request names, or the loaded one if it names none. Raises ServeError."""
        if name in (None, "", self.model.name):
            return self.model
        raise ServeError(
            404,
            "model_not_found",
            f"there is no model {safe_line(str(name), 60)!r} here",
            remedy=f"use {self.model.name!r}, or leave model out",
            param="model",
        )

    @contextmanager
    def admitted(self, model: ServedModel, request: Request) -> Iterator[Generation]:
        """Take a place in the queue for a request until the block ends. Raises ServeError if it is full."""
        if self.draining:
            raise shutting_down()
        most = model.engine.info.n_parallel + self.options.max_queued
        if self._running and self.n_active + request.n > most:
            raise self._busy()
        builder = ReplyBuilder(request, model.lead)
        generation = Generation(model.engine, request, builder, self.mailbox)
        limit = self.options.max_seconds
        timer = asyncio.get_running_loop().call_later(
            limit, generation.cancel, too_slow(f"the request took longer than {limit:g} seconds")
        )
        began = time.perf_counter()
        self._running.add(generation)
        try:
            yield generation
        finally:
            timer.cancel()
            self._running.discard(generation)
            self._mean_seconds += 0.1 * (time.perf_counter() - began - self._mean_seconds)

    def end_all(self) -> None:
        """Cancel all requests, because the server is shutting down."""
        for generation in self._running:
            generation.cancel(shutting_down())

    def close(self) -> None:
        """End the threads."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _busy(self) -> ServeError:
        n_parallel = self.model.engine.info.n_parallel
        seconds = math.ceil(self._mean_seconds * (self.n_queued + 1) / n_parallel)
        wait = min(max(1, seconds), _LONGEST_WAIT)
        return ServeError(
            429,
            "queue_full",
            f"{count(self.n_active, 'reply').replace('replys', 'replies')} are running or waiting",
            remedy=f"try again in {count(wait, 'second')}",
            headers={"retry-after": str(wait)},
        )
