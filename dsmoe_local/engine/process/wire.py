"""The protocol between the engine's process and its client: length-prefixed frames of JSON with typed values.

Pickle is not used: decoded values are only dataclasses, enums and the errors listed here. `host` and `child`
define the messages.

The standard library encodes JSON, and msgspec converts values to types. msgspec's JSON encoder is not used,
since it refuses lone surrogates, which file names and replies may contain, and writes NaN as null.
"""

from __future__ import annotations

import json
import struct
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import msgspec

from dsmoe_local.base import errors as base
from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine import errors
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import TokenEvent

MAX_FRAME = 256 << 20

Plain: TypeAlias = Any
"""A JSON value."""


class Source(Protocol):
    """A buffered binary file."""

    def read(self, size: int, /) -> bytes:
        """Return exactly `size` bytes, fewer only at the end."""
        ...


_LENGTH = struct.Struct("!I")


class WireError(Exception):
    """A frame is not a valid message."""


def _refuse(constant: str) -> NoReturn:
    raise WireError(f"{constant} is not a number")


# Lone surrogates are written as escapes. NaN and infinity are refused in both directions.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_decode = json.JSONDecoder(parse_constant=_refuse).decode


def pack(message: Sequence[Plain]) -> bytes:
    """Return a message as a frame. Raises EngineError if it is too large or a value cannot be JSON."""
    try:
        body = _encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.EngineError(
            f"a message cannot be sent to or from the engine's process: {error}"
        ) from error
    if len(body) > MAX_FRAME:
        raise errors.EngineError(
            "a message is too large to be sent to or from the engine's process", where=f"{len(body):,} bytes"
        )
    return _LENGTH.pack(len(body)) + body


def receive(source: Source) -> list[Plain] | None:
    """Read the next message. Returns None at the end of `source`, also within a frame. Raises WireError."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise WireError(f"a frame has {length} bytes, more than {MAX_FRAME}")
    body = source.read(length)
    if len(body) < length:
        return None
    try:
        message = _decode(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame is not JSON: {error}") from error
    if not isinstance(message, list) or not message:
        raise WireError("a frame is not a message")
    return message


# --- typed values ---


def to_plain(value: object) -> Plain:
    """Return a value as JSON: dataclasses as objects, tuples and TokenEvents as arrays, paths as text."""
    plain: Plain = msgspec.to_builtins(value, enc_hook=_other_to_plain, builtin_types=(bytes,))
    return plain


def _other_to_plain(value: object) -> Plain:
    return str(value) if isinstance(value, Path) else value  # `pack` refuses other types


def _other_from_plain(kind: type, value: Plain) -> object:
    return kind(value)


def from_plain(kind: Any, value: Plain) -> Any:  # noqa: ANN401 - a type expression, and its value
    """Return the value of type `kind` that `to_plain` converted.

    Raises WireError, with the field's name, if a type is wrong, and the errors of the constructor.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_other_from_plain)
    # ValueError is the base of msgspec's error. A lone surrogate in place of a number raises it too.
    except (ValueError, RecursionError) as error:
        raise WireError(f"a value of the wrong type: {error}") from error


# --- token events ---

END_LENGTH = 2  # items in the message for the end of a request: its number, and an error or None


def event_to_plain(number: int, event: TokenEvent) -> Plain:
    """Return an event of the request with this number. Most events have only four values."""
    if (
        event.logprob is None
        and event.progress is None
        and event.finish_reason is None
        and event.usage is None
        and not event.index
        and not event.alternatives
        and not event.dropped
        and not event.held
        and not event.in_reasoning
        and not event.reasoning
        and not event.calls
        and not event.prompt_tokens
    ):
        return (number, event.text, event.seconds, event.token_id)
    _, *values = to_plain(event)
    return (number, *values)


def event_from_plain(request_id: str, value: Plain) -> TokenEvent:
    """Return the event that `event_to_plain` converted. Missing values at the end are the defaults."""
    event: TokenEvent = from_plain(TokenEvent, [request_id, *value[1:]])
    return event


# --- calls ---

CALLS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(getattr(TextEngine, name))
    for name in ("encode", "decode", "detokenize", "save_cache", "load_cache", "set_observers", "observe")
}
"""The methods of TextEngine that the client calls in the engine's process, with the types of their parameters
by name and of the result as "return".
"""


def arguments_from_plain(name: str, value: Plain) -> dict[str, Any]:
    """Return the arguments of a call. Raises LookupError for an unknown call or a missing argument."""
    kinds = {key: kind for key, kind in CALLS[name].items() if key != "return"}
    return {key: from_plain(kind, value[key]) for key, kind in kinds.items()}


# --- progress ---

_PROGRESS: dict[str, Any] = {
    kind.__name__: kind for kind in (progress.Started, progress.Advanced, progress.Finished, progress.Note)
}


def progress_to_plain(event: progress.Event) -> Plain:
    """Return a progress event as the name of its type and its fields."""
    return [type(event).__name__, to_plain(event)]


def progress_from_plain(value: Plain) -> progress.Event:
    """Return the event that `progress_to_plain` converted."""
    name, content = from_plain(tuple[str, Any], value)
    if name not in _PROGRESS:
        raise WireError(f"unknown progress event: {name}")
    event: progress.Event = from_plain(_PROGRESS[name], content)
    return event


# --- errors ---

_ERRORS: dict[str, type[DsmoeError]] = {
    kind.__name__: kind
    for kind in (
        base.DsmoeError,
        base.UsageError,
        base.MissingExtraError,
        base.FileError,
        base.LockedError,
        base.NoSpaceError,
        base.FormatError,
        base.InterruptedRunError,
        errors.EngineError,
        errors.ModelLoadError,
        errors.OutOfMemoryError,
        errors.TemplateError,
        errors.PromptError,
        errors.ContextLengthError,
        errors.NativeError,
        errors.WorkerError,
    )
}


def error_to_plain(error: BaseException) -> Plain:
    """Return an error as the name of its class, or of its first base class in _ERRORS, and its fields."""
    if not isinstance(error, DsmoeError):
        error = errors.EngineError(
            f"internal error in the engine: {type(error).__name__}: {error}",
            remedy="please report it, with the traceback that --log-file FILE keeps",
        )
    name = next(kind.__name__ for kind in type(error).__mro__ if _ERRORS.get(kind.__name__) is kind)
    return [name, error.what, error.where, error.remedy, error.exit_code]


def error_from_plain(value: Plain) -> DsmoeError:
    """Return the error that `error_to_plain` converted. The constructor of the class is not called."""
    name, what, where, remedy, exit_code = from_plain(tuple[str, str, str, str, int], value)
    if name not in _ERRORS:
        raise WireError(f"unknown error: {name}")
    error = _ERRORS[name].__new__(_ERRORS[name])
    DsmoeError.__init__(error, what, where=where, remedy=remedy)
    error.exit_code = exit_code
    return error
