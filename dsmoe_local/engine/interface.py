"""What an engine is to its callers, whether it runs in this process, in another, or is a fake."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from dsmoe_local.base import progress
from dsmoe_local.engine.types import (
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TokenEvent,
)

Deliver: TypeAlias = Callable[[TokenEvent | BaseException | None], None]
"""Called with each event of a request, then with None, or with the error that ended it."""


class Ticket(Protocol):
    """A running request."""

    def cancel(self) -> None:
        """Cancel the request, as `TextEngine.cancel` does. Does nothing once it is over."""
        ...


class TextEngine(Protocol):
    """A loaded model. All methods may be called from any thread."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate a reply and yield its events as they happen. Raises EngineError during the iteration.

        Closing the iterator early cancels the request.
        """
        ...

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Generate a reply without waiting. `deliver` is called in the engine's thread and must not block.

        Errors that `submit` would raise at once are raised, later ones are delivered.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, even while its prompt is processed; its last event has the reason CANCELLED.
        Unknown ids are ignored.
        """
        ...

    def encode(self, prompt: Prompt, *, continue_final_message: bool = False) -> tuple[int, ...]:
        """Return the token ids that `prompt` has in a Request. Raises PromptError, TemplateError."""
        ...

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token's text, as in `TokenLogprob.text`; for special tokens their names.

        Raises PromptError for an id that is not in the vocabulary.
        """
        ...

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write the part of the KV cache that is a prefix of `token_ids` to a new file and sync it. The first
        `start` tokens are left out.

        Returns the length of that prefix. Returns 0 and writes no file if the cache holds no more than
        `start` of the tokens, if a request is running, if the cache is not unified, or if the disk is full.
        """
        ...

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Load the tokens of a file of `save_cache` into the KV cache, as far as they are a prefix of
        `token_ids`. Tokens that the file leaves out must be in the cache already.

        Returns how many of `token_ids` the cache then holds; 0 if the file does not fit or cannot be used
        now. The caller must have verified that the file is unchanged since it was written: the contents are
        not checked, and damaged ones may end the engine's process.
        """
        ...

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers without loading the model again. What the old ones collected is lost. The KV
        cache is kept if the disk has room for a copy of it.

        Raises EngineError while requests run; UsageError, FileError or FormatError if the model cannot have
        these observers. The old ones then stay.
        """
        ...

    def log(self) -> tuple[str, ...]:
        """Return llama.cpp's latest log lines, safe to print."""
        ...

    def observe(self, name: str) -> Observation:
        """Return what the observer with that name has collected. Raises EngineError if there is none."""
        ...

    def close(self) -> None:
        """End all requests and free the model. May be called twice."""
        ...


class ReloadableEngine(TextEngine, Protocol):
    """An engine in a process of its own, which can be killed and replaced. Callable from any thread.

    If the process has died, `start`, `submit`, `encode`, `decode`, `load_cache` and `set_observers` first
    load the model again, which may take minutes. They raise InterruptedRunError if `cancel_all` or `kill`
    ends that. `save_cache` and `observe` do not load it, since the state that they need is lost.
    """

    @property
    def options(self) -> ModelOptions:
        """The options of the loaded model, with the current observers. Used again after a crash."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the process is running. If not, the next request loads the model again."""
        ...

    @property
    def crashes(self) -> int:
        """How often the process has died or was killed, and was replaced."""
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
        """Cancel all requests and every load that a call waits for. Does not wait; signal handlers may call
        it.
        """
        ...

    def kill(self) -> None:
        """Kill the process, even if it hangs, and end every load that a call waits for. Does not wait; signal
        handlers may call it.

        Running requests end with EngineCrashError. The next request loads the model again.
        """
        ...
