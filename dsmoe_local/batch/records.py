"""Input lines to requests: strict JSON, one object a line, every mistake told with its line number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import Message, Prompt, Request, SamplingParameters

MAX_LINE = 64 << 20


class LineError(DsmoeError):
    """A line that is no request; the others go on."""


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """What a line that says nothing else gets."""

    sampling: SamplingParameters
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One input line: its number from 1, the id that its record gets, and its content; `error` if it has
    none.
    """

    number: int
    id: str
    values: Mapping[str, Any]
    error: LineError | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a JSONL file, split at b"\\n" alone; empty ones are skipped. Raises FileError.

    Lines are decoded one at a time: the file may be of any size.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(_raw_lines(file), 1):
                if raw.strip():
                    yield _parse(number, raw)
    except OSError as error:
        raise FileError(f"the input cannot be read: {error.strerror}", where=path) from error


def check_ids(path: Path) -> int:
    """How many requests the file holds.

    FormatError if two have one id: their records could not be told apart.
    """
    seen: dict[str, int] = {}
    count = 0
    for line in read_lines(path):
        count += 1
        if line.id in seen:
            raise FormatError(
                f"the id {safe_line(line.id, 60)!r} occurs twice",
                where=f"{path}, lines {seen[line.id]} and {line.number}",
                remedy="give every line an id of its own, or none",
            )
        seen[line.id] = line.number
    return count


def request_of(line: Line, defaults: BatchDefaults) -> Request:
    """The request that a line makes. Raises LineError, UsageError."""
    if line.error is not None:
        raise line.error
    unknown = [key for key in line.values if key not in _FIELDS]
    if unknown:
        raise LineError(
            f"unknown field {safe_line(unknown[0], 40)!r}", remedy=f"known are {', '.join(_FIELDS)}"
        )
    values = {key: _FIELDS[key](key, value) for key, value in line.values.items() if value is not None}
    if ("prompt" in values) == ("messages" in values):
        raise LineError("a line takes either prompt or messages")
    prompt: Prompt = values["prompt"] if "prompt" in values else values["messages"]
    sampling = {_SAMPLING_NAMES[key]: value for key, value in values.items() if key in _SAMPLING_NAMES}
    return Request(
        line.id,
        prompt,
        replace(defaults.sampling, **sampling),
        max_tokens=values.get("max_tokens", defaults.max_tokens),
        stop=values.get("stop", defaults.stop),
    )


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    first = True
    while raw := file.readline(MAX_LINE + 1):
        if first:
            raw, first = raw.removeprefix(b"\xef\xbb\xbf"), False
        if len(raw) > MAX_LINE:
            # What is kept is too long to be valid; the rest of the line is passed over.
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE)
        yield raw


def _parse(number: int, raw: bytes) -> Line:
    fallback = f"line-{number}"
    try:
        if len(raw) > MAX_LINE:
            raise LineError(f"the line is longer than {MAX_LINE >> 20} MiB")
        values = strict_object(raw)
        return Line(
            number, _id(values, fallback), {k: v for k, v in values.items() if k not in ("id", "custom_id")}
        )
    except LineError as error:
        return Line(number, fallback, {}, error)


def _id(values: Mapping[str, Any], fallback: str) -> str:
    named = [values[key] for key in ("id", "custom_id") if values.get(key) is not None]
    if not named:
        return fallback
    if len(named) > 1 and named[0] != named[1]:
        raise LineError("id and custom_id differ")
    if isinstance(named[0], bool) or not isinstance(named[0], str | int):
        raise LineError("the id is neither text nor a whole number")
    return str(named[0])


def strict_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without NaN or Infinity, without a key twice. LineError if it is none."""

    def refuse(constant: str) -> NoReturn:
        raise LineError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise LineError("a key occurs twice in one object")
        return result

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {safe_line(error.msg, 60)}, column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise LineError("not JSON that can be read: too deep, or too long a number") from error
    if not isinstance(value, dict):
        raise LineError("not a JSON object")
    if "\\ud" in text.lower():
        # Escapes can spell half a pair, which no output could hold.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise LineError("half of a surrogate pair is no text") from error
    return value


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise LineError(f"{key} is not text")
    return value


def _prompt(key: str, value: object) -> str | tuple[int, ...]:
    if isinstance(value, list):
        if not value:
            raise LineError(f"{key} is an empty list")
        return tuple(_integer(key, item) for item in value)
    return _text(key, value)


def _messages(key: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise LineError("messages is not a list of messages")
    messages = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise LineError("a message takes exactly role and content")
        messages.append(Message(_text("role", item["role"]), _text("content", item["content"])))
    return tuple(messages)


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LineError(f"{key} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise LineError(f"{key} is out of range") from error


def _integer(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LineError(f"{key} is not a whole number")
    return value


def _stop(key: str, value: object) -> tuple[str, ...]:
    return tuple(_text(key, item) for item in (value if isinstance(value, list) else [value]))


_SAMPLING_NAMES: Mapping[str, str] = {
    **{item.name: item.name for item in fields(SamplingParameters)},
    "repetition_penalty": "repeat_penalty",
}
_WHOLE = ("top_k", "repeat_last_n", "seed")
_FIELDS: Mapping[str, Callable[[str, object], Any]] = {
    "prompt": _prompt,
    "messages": _messages,
    "max_tokens": _integer,
    "stop": _stop,
    **{name: _integer if name in _WHOLE else _number for name in _SAMPLING_NAMES},
}


def describe(error: DsmoeError) -> tuple[str, str]:
    """An error record's code and message."""
    code = "invalid_request" if isinstance(error, LineError | UsageError) else _code(error)
    return code, "; ".join(safe_line(line) for line in str(error).splitlines())


def _code(error: DsmoeError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return (
        "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_") + "_error"
    )
