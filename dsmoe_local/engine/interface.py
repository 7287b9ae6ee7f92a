"""The interfaces of an engine: in this process, in a child process, or a fake for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dsmoe_local.base import progress
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

Deliver: TypeAlias = Callable[[TokenEvent | BaseException | None], None]
"""Called with each event of a request, then with None, or with the error that ended it."""


class Ticket(Protocol):
    """A running request."""

    def cancel(self) -> None:
        """Cancel the request, as `TextEngine.cancel` does. Do nothing if it has ended."""
        ...


class TextEngine(Protocol):
    """A loaded model. All methods may be called from any thread."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply and yield its events as they happen.

        Raises EngineError during the iteration. Closing the iterator early cancels the request.
        """
        ...

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Start to generate a reply and return at once.

        `deliver` is called in the engine's thread and must not block. An error before the request starts is
        raised here; a later one is passed to `deliver`.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, also during its prefill. Its last event has the finish reason CANCELLED.

        Unknown ids are ignored.
        """
        ...

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: tuple[Tool, ...] = (),
    ) -> tuple[int, ...]:
        """Return the token ids of `prompt`, as in a Request. Raises PromptError, TemplateError."""
        ...

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token's text, as in `TokenLogprob.text`; for special tokens their names.

        Raises PromptError for an id that is not in the vocabulary.
        """
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sequence of tokens; for special tokens their names.

        Unlike the texts of `decode`, it has the characters that consist of several tokens. Raises PromptError
        for an id that is not in the vocabulary.
        """
        ...

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write the longest cached prefix of `token_ids`, without its first `start` tokens, to a new file.

        Returns the length of the prefix, including the first `start` tokens. The file is then synced. Returns
        0 and writes no file if the prefix is not longer than `start`, if a request is running, if the cache
        is not unified, or if the disk is full.
        """
        ...

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Load the common prefix of `token_ids` and a file of `save_cache` into the KV cache.

        The first `start` tokens, which the file does not contain, must be in the cache already. Returns how
        many of `token_ids` the cache then holds; 0 if the file cannot be used: it has another
        `cache_identity`, a request is running, or the cache is not unified.

        The caller must verify that the file has not changed since it was written. The state is not checked,
        and a damaged one may crash the engine's process.
        """
        ...

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers without loading the model again.

        The data of the old observers are lost. The KV cache is kept if the disk has room for a copy of it.
        Raises EngineError if requests are running; UsageError, FileError or FormatError if an observer cannot
        be created. After an error the old observers stay.
        """
        ...

    def log(self) -> tuple[str, ...]:
        """Return llama.cpp's latest log lines, safe to print."""
        ...

    def observe(self, name: str) -> Observation:
        """Return the summary of an observer. Raises EngineError if there is none with that name."""
        ...

    def close(self) -> None:
        """End all requests and free the model. May be called twice."""
        ...


class ReloadableEngine(TextEngine, Protocol):
    """An engine in a child process that can be killed and replaced. Callable from any thread.

    If the process has died, `start`, `submit`, `encode`, `decode`, `detokenize`, `load_cache` and
    `set_observers` first load the model again, which may take minutes. They raise InterruptedRunError if
    `cancel_all` or `kill` stops that load. `save_cache` and `observe` do not load the model, since their data
    died with the process.
    """

    @property
    def options(self) -> ModelOptions:
        """The options of the loaded model, with the current observers. A restart uses them again."""
        ...

    @property
    def alive(self) -> bool:
        """True if the process is running. Otherwise the next request loads the model again."""
        ...

    @property
    def crashes(self) -> int:
        """The number of processes that crashed or were killed and have been replaced."""
        ...

    @property
    def pid(self) -> int:
        """The id of the process."""
        ...

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """Load another model, or the same one with other options. The old one is freed first.

        `listen`, `stop` and errors are those of `Engine.load`; `cancel_all` and `kill` also end the load.
        After an error the old options stay, and the next request loads the old model again.
        """
        ...

    def cancel_all(self) -> None:
        """Cancel all requests, and every load that a call waits for.

        Does not wait, so signal handlers may call it.
        """
        ...

    def kill(self) -> None:
        """Kill the process, also if it hangs, and cancel every load that a call waits for.

        Running requests end with EngineKilledError. The next request loads the model again. Does not wait, so
        signal handlers may call it.
        """
        ...
