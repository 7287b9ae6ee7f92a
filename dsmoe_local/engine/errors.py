"""What can go wrong between a request and its reply, as branches of the error tree. Raises nothing itself."""

from __future__ import annotations

from dsmoe_local.base.errors import DsmoeError


class EngineError(DsmoeError):
    """The engine cannot do what it was asked."""


class ModelLoadError(EngineError):
    """llama.cpp refused a model that the strict reader accepted; `where` carries its own last word."""


class OutOfMemoryError(EngineError):
    """Not even the smallest context fits into the memory that is available."""


class TemplateError(EngineError):
    """A chat template is malformed, refuses the messages, or needs too much time or room."""


class PromptError(EngineError):
    """A prompt that cannot be read: too long for the context, empty, or one endless word."""


def too_long(length: str, n_context: int) -> PromptError:
    """The error for a prompt of that length, where the context has no room for it and a reply."""
    return PromptError(
        f"the message was not sent: the prompt has {length}, the context holds {n_context:,} tokens",
        remedy="shorten it, or load with a longer context (-c); "
        "in a chat, /clear or /set on_full shift makes room, too",
    )


class NativeError(EngineError):
    """llama.cpp failed in the middle of the work."""


class EngineCrashError(EngineError):
    """The engine's process died; `where` carries the last line of its log, `log` its last lines."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "", log: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.log = log


class EngineKilledError(EngineCrashError):
    """The engine's process was ended on request, since it did not answer."""
