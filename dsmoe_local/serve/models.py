"""The models of a server: loaded when a request names them, unloaded when others need room."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.protocol.replies import reply_lead
from dsmoe_local.serve.errors import ServeError

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
    is).
    """

    known: Callable[[], Mapping[str, Path]]
    load: Callable[[Path], ReloadableEngine]
    fits: Callable[[Path], bool]
    keep: int = 1
    idle_seconds: float = 0.0


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
        self._freed = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def loaded(self) -> tuple[ServedModel, ...]:
        """The loaded models."""
        return tuple(self._loaded.values())

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a model to be loaded."""
        return sum(n for name, n in self._users.items() if name not in self._loaded)

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
        near = ", ".join(safe_line(each, 40) for each in list(await self.known())[:4])
        raise ServeError(
            404,
            "model_not_found",
            f"there is no model {safe_line(str(name), 60)!r} here",
            remedy=f"leave model out, or use one of /v1/models: {near}",
            param="model",
        )

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[ServedModel]:
        """Load a model if need be, and keep it until the block ends. Raises the errors of loading."""
        self._users[name] += 1
        if timer := self._timers.pop(name, None):
            timer.cancel()
        try:
            yield self._loaded.get(name) or await self._load(name)
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                self._unused(name)

    def _unused(self, name: str) -> None:
        del self._users[name]
        self._freed.set()
        if name not in self._loaded:
            return
        self._loaded[name] = self._loaded.pop(name)  # now the most recently used
        if self._source.idle_seconds:
            loop = asyncio.get_running_loop()
            self._timers[name] = loop.call_later(
                self._source.idle_seconds, lambda: self._executor.submit(self._take_out(name).close)
            )

    async def _load(self, name: str) -> ServedModel:
        async with self._turn:
            if model := self._loaded.get(name):
                return model
            path = (await self.known())[name]
            while len(self._loaded) >= self._source.keep:
                await self._make_room()
            while self._unused_names() and not await self._in_thread(lambda: self._source.fits(path)):
                await self._make_room()
            began = time.perf_counter()
            model = await self._in_thread(lambda: ServedModel.of(name, self._source.load(path)))
            self._loaded[name] = model
            self._log(f"{safe_line(name, 60)}: loaded in {time.perf_counter() - began:.1f} s")
            return model

    async def _make_room(self) -> None:
        """Unload the model that was not used for the longest time. Waits until one is not used."""
        unused = self._unused_names()
        if unused:
            await self._in_thread(self._take_out(unused[0]).close)
        else:
            self._freed.clear()
            await self._freed.wait()

    def _unused_names(self) -> list[str]:
        return [name for name in self._loaded if not self._users[name]]

    def _take_out(self, name: str) -> ReloadableEngine:
        """Remove a model that is not used. Return its engine, which is still open."""
        if timer := self._timers.pop(name, None):
            timer.cancel()
        model = self._loaded.pop(name)
        self._log(f"{safe_line(name, 60)}: unloaded")
        return model.engine

    def close(self) -> None:
        """Free all models."""
        for timer in self._timers.values():
            timer.cancel()
        for model in self._loaded.values():
            model.engine.close()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
