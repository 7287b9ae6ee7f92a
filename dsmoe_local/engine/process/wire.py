"""How the engine's process and its client talk: length-prefixed frames of JSON, and typed values as such.

Never pickle: what is read can only become the dataclasses, enums and errors named here. What the messages
mean is `host`'s and `client`'s concern.
"""

from __future__ import annotations

import json
import struct
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

from dsmoe_local.base import errors as base
from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine import errors
from dsmoe_local.engine.types import Message, Prompt, TokenEvent

MAX_FRAME = 256 << 20

T = TypeVar("T")
Plain: TypeAlias = Any
"""What JSON can carry."""


class Source(Protocol):
    """What is read from: a buffered file."""

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        ...


_LENGTH = struct.Struct("!I")


class WireError(Exception):
    """What arrived is no message of ours: the other side is broken, or was when it wrote."""


def _refuse(constant: str) -> NoReturn:
    raise WireError(f"{constant} is no number")


# Lone surrogates travel as escapes, which keeps them exact. NaN is neither written nor read.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_decode = json.JSONDecoder(parse_constant=_refuse).decode


def pack(message: Sequence[Plain]) -> bytes:
    """A frame. EngineError if the message holds what JSON has not, or is too large."""
    try:
        body = _encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.EngineError(f"this cannot be sent to or from the engine's process: {error}") from error
    if len(body) > MAX_FRAME:
        raise errors.EngineError(
            "this is too large to be sent to or from the engine's process", where=f"{len(body)} bytes"
        )
    return _LENGTH.pack(len(body)) + body


def receive(source: Source) -> list[Plain] | None:
    """The next message; None at the end, also in the middle of a frame. WireError if it is none."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise WireError(f"a frame of {length} bytes")
    body = source.read(length)
    if len(body) < length:
        return None
    try:
        message = _decode(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame that is no JSON: {error}") from error
    if not isinstance(message, list) or not message:
        raise WireError("a frame that is no message")
    return message


# --- typed values ---


def to_plain(value: object) -> Plain:
    """A dataclass becomes the list of its fields, a tuple a list, a path its text; plain values stay."""
    if is_dataclass(value) and not isinstance(value, type):
        return [to_plain(getattr(value, name)) for name in _names(type(value))]
    if isinstance(value, tuple):
        if all(type(item) is int for item in value):
            return value  # token ids: as they are, and JSON's lists
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def from_plain(kind: type[T], value: Plain) -> T:
    """The dataclass that `to_plain` took apart. WireError if it cannot be one; its own errors pass."""
    expression: Any = kind
    result: T = _reader(expression)(value)
    return result


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


_Reader: TypeAlias = Callable[[Plain], Any]


def _shaped(read: _Reader) -> _Reader:
    """Report a value of the wrong shape as such."""

    def checked(value: Plain) -> Any:  # noqa: ANN401 - any type's reader
        try:
            return read(value)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise _unexpected(value) from error

    return checked


@cache
def _reader(kind: Any) -> _Reader:  # noqa: ANN401 - a type expression
    """What makes a value of that type of a plain one."""
    if kind == Prompt:
        return prompt_from_plain
    plain = _plain_types(kind)
    if plain:
        return _plain_reader(plain)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _optional_reader(arguments)
    if origin is tuple:
        return _tuple_reader(arguments)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_reader(kind)
    return _shaped(kind)


_PLAIN: dict[Any, frozenset[type]] = {
    **{kind: frozenset({kind}) for kind in (str, int, bool, dict, types.NoneType)},
    float: frozenset({float, int}),
}


def _plain_types(kind: Any) -> frozenset[type]:  # noqa: ANN401 - a type expression
    """The types of values that are read as they are; none if there are others."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    known = [_PLAIN.get(typing.get_origin(part) or part) for part in parts]
    return frozenset[type]().union(*known) if None not in known else frozenset()  # type: ignore[arg-type]


def _plain_reader(kinds: frozenset[type]) -> _Reader:
    def read(value: Plain) -> Plain:
        if type(value) not in kinds:
            raise _unexpected(value)
        return value

    return read


def _unexpected(value: Plain) -> WireError:
    return WireError(f"{str(value)[:80]!r} is not of the type that was expected")


def _optional_reader(arguments: tuple[Any, ...]) -> _Reader:
    """Of values that do not tell themselves apart a union has one at most."""
    (read,) = [_reader(kind) for kind in arguments if kind not in _PLAIN]
    return lambda value: None if value is None else read(value)


def _tuple_reader(arguments: tuple[Any, ...]) -> _Reader:
    if arguments[-1:] == (...,):
        kinds = _plain_types(arguments[0])
        if kinds:
            return lambda value: _all_plain(value, kinds)
        read = _reader(arguments[0])
        return _shaped(lambda value: tuple(map(read, _list(value))))
    readers = tuple(map(_reader, arguments))
    return _shaped(lambda value: tuple(read(item) for read, item in zip(readers, _list(value), strict=True)))


def _list(value: Plain) -> Sequence[Plain]:
    if not isinstance(value, list | tuple):
        raise _unexpected(value)
    return value


def _all_plain(value: Plain, kinds: frozenset[type]) -> tuple[Plain, ...]:
    if not set(map(type, _list(value))) <= kinds:
        raise _unexpected(value)
    return tuple(value)


def _dataclass_reader(kind: type) -> _Reader:
    hints = typing.get_type_hints(kind)
    readers = [_reader(hints[name]) for name in _names(kind)]
    return _shaped(
        lambda value: kind(*[read(item) for read, item in zip(readers, _list(value), strict=True)])
    )


def prompt_from_plain(value: Plain) -> Prompt:
    """Text, messages or token ids, told apart by their shape."""
    if isinstance(value, str):
        return value
    if _list(value) and isinstance(value[0], list):
        return tuple(from_plain(Message, item) for item in value)
    return _all_plain(value, _PLAIN[int])


# --- token events, of which there are many ---

END_LENGTH = 2  # the end of a request: its number and an error, or nothing
_SHORT = 4
_TOKEN_ID = frozenset({int, types.NoneType})


def event_to_plain(number: int, event: TokenEvent) -> Plain:
    """An event of the request with that number; the usual ones are four values."""
    if (
        event.logprob is None
        and event.progress is None
        and event.finish_reason is None
        and event.usage is None
        and not event.index
        and not event.alternatives
        and not event.dropped
    ):
        return (number, event.text, event.seconds, event.token_id)
    return (number, *to_plain(event)[1:])


def event_from_plain(request_id: str, value: Plain) -> TokenEvent:
    """The event that `event_to_plain` took apart."""
    if len(value) == _SHORT:
        _, text, seconds, token_id = value
        if type(text) is not str or type(seconds) is not float or type(token_id) not in _TOKEN_ID:
            raise _unexpected(value)
        return TokenEvent(request_id, text, seconds, token_id)
    return from_plain(TokenEvent, [request_id, *value[1:]])


# --- progress ---

_PROGRESS: dict[str, Any] = {
    kind.__name__: kind for kind in (progress.Started, progress.Advanced, progress.Finished, progress.Note)
}


def progress_to_plain(event: progress.Event) -> Plain:
    """A progress event, by its type's name."""
    return [type(event).__name__, to_plain(event)]


def progress_from_plain(value: Plain) -> progress.Event:
    """The progress event."""
    name, content = _list(value)
    if name not in _PROGRESS:
        raise WireError(f"no progress: {name}")
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
        errors.NativeError,
    )
}


def error_to_plain(error: BaseException) -> Plain:
    """An error by the name of its class, or of the nearest one above that the table has."""
    if not isinstance(error, DsmoeError):
        error = errors.EngineError(
            f"internal error in the engine: {type(error).__name__}: {error}",
            remedy="report it; --log-file FILE keeps the traceback",
        )
    name = next(kind.__name__ for kind in type(error).__mro__ if _ERRORS.get(kind.__name__) is kind)
    return [name, error.what, error.where, error.remedy, error.exit_code]


def error_from_plain(value: Plain) -> DsmoeError:
    """The error, with its three lines and its exit code; its own constructor is not called."""
    name, what, where, remedy, exit_code = value
    if name not in _ERRORS:
        raise WireError(f"no error: {name}")
    if {type(what), type(where), type(remedy)} != {str} or type(exit_code) is not int:
        raise _unexpected(value)
    error = _ERRORS[name].__new__(_ERRORS[name])
    DsmoeError.__init__(error, what, where=where, remedy=remedy)
    error.exit_code = exit_code
    return error
