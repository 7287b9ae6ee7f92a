"""What a running server knows: its models, its running requests, and whether it is shutting down."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from dsmoe_local.base.text import count, safe_line
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.experts.activity import Activity
from dsmoe_local.serve.errors import ServeError, shutting_down, too_slow
from dsmoe_local.serve.generation import Generation, Mailbox
from dsmoe_local.serve.metrics import Metrics
from dsmoe_local.serve.models import Log, Models, ModelSource, ServedModel
from dsmoe_local.serve.options import ServeOptions

T = TypeVar("T")

_THREADS = 4  # for files, and to load and free models
_TOKENIZER_THREADS = 2  # of their own, so that they leave those of the replies free
_LOGGED = 100_000  # characters of a body
_LONGEST_WAIT = 60  # seconds, the most that Retry-After says


@dataclass(frozen=True, slots=True)
class LastExperts:
    """The activity of the routed experts during the last finished reply, which has `n_tokens` tokens. `id` is
    the unique part of the reply's id.
    """

    id: str
    model: str
    n_tokens: int
    activity: Activity


class ServerState:
    """Created in the event loop of the server, closed by it. `first` is the model that is loaded already."""

    def __init__(self, first: ServedModel, source: ModelSource, options: ServeOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.draining = False
        n_threads = options.max_queued + first.engine.info.n_parallel + _THREADS
        self.executor = ThreadPoolExecutor(n_threads, thread_name_prefix="dsmoe-serve")
        self._tokenizers = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="dsmoe-tokenize")
        self.models = Models(first, source, self.executor, log)
        self.metrics = Metrics(self.models, lambda: self.n_active - self.n_queued, lambda: self.n_queued)
        self.mailbox = Mailbox(asyncio.get_running_loop())
        self.last_experts: LastExperts | None = None
        self._admitted: set[Generation] = set()  # those that wait for their model, too
        self._running: dict[Generation, ServedModel] = {}
        self._mean_seconds = 1.0

    @property
    def n_active(self) -> int:
        """Replies that run or wait."""
        return sum(generation.n for generation in self._running) + self.models.n_waiting

    @property
    def n_queued(self) -> int:
        """Replies that wait for a slot, or for their model."""
        waiting = (self._n_active_of(model) - model.engine.info.n_parallel for model in self.models.loaded)
        return sum(max(0, n) for n in waiting) + self.models.n_waiting

    def _n_active_of(self, model: ServedModel) -> int:
        return sum(generation.n for generation, its in self._running.items() if its is model)

    def log_body(self, body: Mapping[str, Any]) -> None:
        """Log the body of a request, if the user asked for it."""
        if self.options.log_text:
            self.log(safe_line(json.dumps(body, ensure_ascii=False), _LOGGED))

    @asynccontextmanager
    async def admitted(self, name: str, generation: Generation) -> AsyncIterator[None]:
        """Load the model, take a place in its queue and start the request. Keep both until the block ends.

        Raises ServeError if the queue is full or the request is too large for it, errors of loading, and the
        reason if the request is cancelled.
        """
        self.check_accepting()
        n = generation.n
        if self.models.n_waiting:
            self._check_room(self.models.n_waiting, n, 1)
        self._admitted.add(generation)
        try:
            with self._time_limit(generation):
                while name == self.models.leaving:
                    await generation.wait_for(self.models.wait_turn(n))
                with self.models.kept(name, n):
                    model = await generation.wait_for(self.models.get(name))
                    with self._place(model, generation):
                        await generation.start(model.engine, model.lead, self.executor)
                        yield
        finally:
            self._admitted.remove(generation)

    def check_accepting(self) -> None:
        """Raise ServeError if the server is shutting down."""
        if self.draining:
            raise shutting_down()

    @contextmanager
    def _place(self, model: ServedModel, generation: Generation) -> Iterator[None]:
        """Take a place in the queue of a model for each reply. Raises ServeError if there are too few."""
        n_parallel = model.engine.info.n_parallel
        n_places = n_parallel + self.options.max_queued
        if generation.n > n_places:
            raise ServeError(
                400,
                "too_many_replies",
                f"the request asks for {generation.n:,} replies (prompts times n), but the server takes"
                f" {n_places:,} at once: {n_parallel} running and {self.options.max_queued:,} waiting",
                remedy="send fewer prompts at once, or start the server with a larger --max-queue",
            )
        self._check_room(self._n_active_of(model), generation.n, n_parallel)
        began = time.perf_counter()
        self._running[generation] = model
        try:
            yield
        finally:
            del self._running[generation]
            self._mean_seconds += 0.1 * (time.perf_counter() - began - self._mean_seconds)

    @contextmanager
    def _time_limit(self, generation: Generation) -> Iterator[None]:
        limit = self.options.max_seconds
        timer = asyncio.get_running_loop().call_later(limit, generation.cancel, self._too_slow())
        try:
            yield
        finally:
            timer.cancel()

    def _too_slow(self) -> ServeError:
        return too_slow(f"the request took longer than {self.options.max_seconds:g} seconds")

    async def ask_tokenizer(self, name: str, function: Callable[[ReloadableEngine], T]) -> T:
        """Call a function of the tokenizer of a model in a thread. Raises errors of loading, and ServeError
        after the time limit.
        """
        self.check_accepting()
        try:
            async with asyncio.timeout(self.options.max_seconds):
                while name == self.models.leaving:
                    await self.models.wait_turn()
                with self.models.kept(name):
                    model = await self.models.get(name)
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(self._tokenizers, function, model.engine)
        except TimeoutError:
            raise self._too_slow() from None

    def end_all(self) -> None:
        """Cancel all requests and loads, because the server is shutting down."""
        for generation in self._admitted:
            generation.cancel(shutting_down())
        self.models.stop_loads()

    async def close(self) -> None:
        """Free the models and end the threads."""
        await self.models.close()
        for executor in (self.executor, self._tokenizers):
            executor.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, n_active: int, n: int, n_parallel: int) -> None:
        """Raise ServeError if there is no room for `n` replies beside `n_active`."""
        n_places = n_parallel + self.options.max_queued
        if n_active + n <= n_places:
            return
        seconds = math.ceil(self._mean_seconds * (self.n_queued + 1) / n_parallel)
        wait = min(max(1, seconds), _LONGEST_WAIT)
        raise ServeError(
            429,
            "queue_full",
            f"{n_active:,} of {count(n_places, 'place')} for replies are taken, the request needs {n:,}",
            remedy=f"try again in {count(wait, 'second')}",
            headers={"retry-after": str(wait)},
        )
