"""The models of a server: loaded when a request names them, unloaded when others need room."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.protocol.replies import reply_lead
from dsmoe_local.serve.errors import ServeError, hung_up, shutting_down

T = TypeVar("T")

Log: TypeAlias = Callable[[str], None]
"""Takes one line of the log, safe to print."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model under the name that requests use. `lead` is that of `reply_lead`."""

    name: str
    engine: ReloadableEngine
    lead: str

    @classmethod
    def of(cls, name: str, engine: ReloadableEngine) -> ServedModel:
        """Return a model that has just been loaded."""
        return cls(name, engine, reply_lead(engine))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where models come from: `known` returns the files by name, `fits` says whether the free memory has room
    for one, `load` loads it. All of them may block.

    At most `keep` models are loaded at once. A model that is not used for `idle_seconds` is unloaded (0: none
    is). If a load has waited for room for `patience_seconds`, new requests for a model that is in use wait
    for that load. `stop` is set when the server ends its requests; loads in progress should end, too.
    """

    known: Callable[[], Mapping[str, Path]]
    load: Callable[[Path], ReloadableEngine]
    fits: Callable[[Path], bool]
    keep: int = 1
    idle_seconds: float = 0.0
    patience_seconds: float = 30.0
    stop: threading.Event = field(default_factory=threading.Event)


class Models:
    """Loads and unloads models. `first` is loaded already; requests that name no model use it.

    All methods are called in the event loop; files and engines are handled in threads of `executor`.
    """

    def __init__(self, first: ServedModel, source: ModelSource, executor: Executor, log: Log) -> None:
        self.first = first.name
        self.created = int(time.time())
        self._first_path = first.engine.info.path
        self._source = source
        self._executor = executor
        self._log = log
        self._loaded = {first.name: first}  # the least recently used first
        self._users = Counter[str]()
        self._turn = asyncio.Lock()  # one load at a time
        self._loads: dict[str, asyncio.Task[ServedModel]] = {}
        self._freed = asyncio.Event()
        self.leaving = ""
        """A model in use that is to make room for another one: new requests for it call `wait_turn`."""
        self._left = asyncio.Event()
        self._n_held = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def loaded(self) -> tuple[ServedModel, ...]:
        """The loaded models."""
        return tuple(self._loaded.values())

    @property
    def n_waiting(self) -> int:
        """Replies that wait for a model to be loaded."""
        return sum(n for name, n in self._users.items() if name not in self._loaded) + self._n_held

    async def known(self) -> dict[str, Path]:
        """Return the files of all models by name. The first one is that of requests that name none."""
        found = dict(await self._in_thread(self._source.known))
        return {self.first: self._first_path} | found | {self.first: self._first_path}

    async def resolve(self, name: object) -> str:
        """Return the name of the model that a request names. Raises ServeError if there is none."""
        if name in (None, ""):
            return self.first
        if isinstance(name, str) and (name in self._loaded or name in await self.known()):
            return name
        raise await self._not_found(name)

    async def _not_found(self, name: object) -> ServeError:
        near = ", ".join(safe_line(each, 40) for each in list(await self.known())[:4])
        return ServeError(
            404,
            "model_not_found",
            f"there is no model {safe_line(str(name), 60)!r} here",
            remedy=f"leave model out, or use one of /v1/models: {near}",
            param="model",
        )

    async def wait_turn(self, n: int = 1) -> None:
        """Wait until the model that is `leaving` has made room for another one, with `n` replies."""
        self._n_held += n
        try:
            await self._left.wait()
        finally:
            self._n_held -= n

    @contextmanager
    def kept(self, name: str, n: int = 1) -> Iterator[None]:
        """Keep a model for `n` replies until the block ends, once `get` has loaded it."""
        self._users[name] += n
        if timer := self._timers.pop(name, None):
            timer.cancel()
        try:
            yield
        finally:
            self._users[name] -= n
            if not self._users[name]:
                self._unused(name)

    async def get(self, name: str) -> ServedModel:
        """Return a model that is `kept`, and load it if need be. Raises the errors of loading.

        If the caller is cancelled, a load that has begun goes on. One that waits for room ends once nobody
        keeps the model.
        """
        if model := self._loaded.get(name):
            return model
        if name not in self._loads:
            load = self._loads[name] = asyncio.create_task(self._load(name))
            # Otherwise asyncio reports an error of a load that nobody waits for any more.
            load.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(self._loads[name])

    def _unused(self, name: str) -> None:
        del self._users[name]
        self._freed.set()
        if name in self._loaded:
            self._keep_unused(name)

    def _keep_unused(self, name: str) -> None:
        self._loaded[name] = self._loaded.pop(name)  # now the most recently used
        if self._source.idle_seconds:
            loop = asyncio.get_running_loop()
            self._timers[name] = loop.call_later(
                self._source.idle_seconds, lambda: self._executor.submit(self._take_out(name).close)
            )

    async def _load(self, name: str) -> ServedModel:
        try:
            async with self._turn:
                path = await self._room_for(name)
                began = time.perf_counter()
                model = await self._in_thread(lambda: ServedModel.of(name, self._source.load(path)))
                self._loaded[name] = model
                self._log(f"{safe_line(name, 60)}: loaded in {time.perf_counter() - began:.1f} s")
                if not self._users[name]:
                    self._keep_unused(name)
                return model
        finally:
            self._stay()
            # At once, so that no request joins a load that has failed.
            del self._loads[name]

    def _stay(self) -> None:
        """Let requests go on that wait for a model to leave."""
        self.leaving = ""
        self._left.set()

    async def _room_for(self, name: str) -> Path:
        """Unload others until a model has room. Return its file."""
        path = (await self.known()).get(name)
        if path is None:  # it was there when the request came
            raise await self._not_found(name)
        patient_until = asyncio.get_running_loop().time() + self._source.patience_seconds
        while len(self._loaded) >= self._source.keep:
            self._check_wanted(name)
            await self._make_room(name, patient_until)
        while self._unused_names() and not await self._in_thread(lambda: self._source.fits(path)):
            await self._make_room(name, patient_until)
        self._check_wanted(name)
        return path

    def _check_wanted(self, name: str) -> None:
        """Raise an error if the server is shutting down, or if nobody waits for the model any more."""
        if self._source.stop.is_set():
            raise shutting_down()
        if not self._users[name]:
            raise hung_up()

    async def _make_room(self, name: str, patient_until: float) -> None:
        """Unload the model that was not used for the longest time, in favour of the model `name`. Waits until
        one is not used. After the time `patient_until`, one of them gets no new requests.
        """
        unused = self._unused_names()
        if unused:
            await self._in_thread(self._take_out(unused[0]).close)
            return
        self._freed.clear()
        try:
            async with asyncio.timeout_at(None if self.leaving else patient_until):
                await self._freed.wait()
        except TimeoutError:
            self.leaving = next(iter(self._loaded))
            self._left.clear()
            leaving, wanted = safe_line(self.leaving, 60), safe_line(name, 60)
            self._log(f"{leaving}: new requests wait, because {wanted} needs room")

    def _unused_names(self) -> list[str]:
        return [name for name in self._loaded if not self._users[name]]

    def _take_out(self, name: str) -> ReloadableEngine:
        """Remove a model that is not used. Return its engine, which is still open."""
        if timer := self._timers.pop(name, None):
            timer.cancel()
        model = self._loaded.pop(name)
        self._log(f"{safe_line(name, 60)}: unloaded")
        return model.engine

    def stop_loads(self) -> None:
        """End all loads, because the server is shutting down."""
        self._source.stop.set()
        self._freed.set()

    async def close(self) -> None:
        """Free all models, also those that are still being loaded."""
        self.stop_loads()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for timer in self._timers.values():
            timer.cancel()
        for model in self._loaded.values():
            model.engine.close()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
