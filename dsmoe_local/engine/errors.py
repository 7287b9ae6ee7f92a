"""The errors of the engine."""

from __future__ import annotations

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line

LESS_MEMORY = "memory is full: offload less (-ngl, --n-cpu-moe), or use a smaller context (-c)"
"""The remedy if a buffer on a device, or in main memory, cannot be allocated."""


class EngineError(DsmoeError):
    """The engine cannot do what it was asked."""


class ModelLoadError(EngineError):
    """llama.cpp cannot load a model, or create its context. `where` is llama.cpp's log message."""


class WorkerError(ModelLoadError):
    """A worker cannot be used: it cannot be reached, hangs, is another program, or has another version."""


class OutOfMemoryError(EngineError):
    """The smallest possible context does not fit into the available memory."""


class TemplateError(EngineError):
    """A chat template is malformed, refuses the messages, or needs too much time or memory."""


def template_error(source: str, reason: str) -> TemplateError:
    """Return the error for a chat template. `source` says where it comes from, `reason` why it fails."""
    return TemplateError(
        f"the chat template ({source}) fails: {safe_line(reason, 60)}",
        remedy="check the messages, or name another template with --chat-template",
    )


class PromptError(EngineError):
    """A prompt cannot be encoded, is empty, or does not fit into the context."""


class ContextLengthError(PromptError):
    """A prompt leaves no room for a reply."""


def too_long(length: str, n_context: int, n_trained: int) -> ContextLengthError:
    """Return the error for a prompt that leaves no room for a reply. `length` includes its unit.

    `n_trained` is the context that the model was trained for.
    """
    longer = f", or use a longer context (-c, at most {n_trained})"
    return ContextLengthError(
        f"the message was not sent: the prompt has {length}, the context holds {n_context:,} tokens",
        remedy="shorten it" + (longer if n_context < n_trained else "; the model was trained for no more"),
    )


class NativeError(EngineError):
    """llama.cpp failed during a computation."""


class EngineCrashError(EngineError):
    """The engine's process died. `where` has the last line of its log, `log` its last lines."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "", log: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.log = log


class WorkerLostError(EngineCrashError):
    """The engine's process died because it lost a worker, or was killed because a worker made no progress."""


class EngineKilledError(EngineCrashError):
    """The engine's process was killed on request."""
