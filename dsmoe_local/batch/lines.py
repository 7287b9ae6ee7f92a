"""One line of a batch's input: its id, its key, and the error in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import RequestError, describe

MAX_LINE = 64 << 20
# `json.dumps` would make an encoder for each line.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
ID_FIELDS = ("custom_id", "id")


@dataclass(frozen=True, slots=True)
class Key:
    """Hashes that identify a line and its record: 64 bits of the id, and 64 bits of the rest of the line."""

    id: int
    content: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an input, or one row of a Parquet file.

    `number` counts from 1, `place` is its name in messages, `id` is that of its record. `values` are the
    fields of the request (none if there is an `error`), `kept` the fields that are copied to the record.
    """

    number: int
    place: str
    id: str
    key: Key
    values: Mapping[str, Any]
    error: RequestError | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def hash64(data: bytes) -> int:
    """Return a 64-bit hash."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def key_of(name: str, raw: bytes, values: Mapping[str, Any], kept: Mapping[str, Any]) -> Key:
    """Return the key of a line with the id `name`. White space and the order of fields do not change it.

    A line without `values` is not valid: its key depends on every byte.
    """
    content = raw
    if values:
        parts = {"values": values, "kept": kept} if kept else values
        content = _encode(parts).encode()
    return Key(hash64(name.encode()), hash64(content))


def id_of(values: Mapping[str, Any], id_field: str | None, default: str) -> str:
    """Return a line's id: from the field `id_field`, or else from `id` or `custom_id`, or else `default`.

    RequestError if `id_field` is missing or the value is not an id.
    """
    found = [field_of(values, id_field)] if id_field else [values.get(name) for name in ID_FIELDS]
    named = [value for value in found if value is not None and value != ""]
    if not named and id_field:
        raise RequestError(f"the id field {safe_line(id_field, 40)!r} is missing", kind="missing_field")
    if not named:
        return default
    if len(named) > 1 and named[0] != named[1]:
        raise RequestError("id and custom_id differ")
    if isinstance(named[0], bool) or not isinstance(named[0], str | int):
        raise RequestError("the id is neither text nor a whole number")
    return str(named[0])


def field_of(values: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - JSON
    """Return a field of a line or of its body; None if neither has it."""
    body = values.get("body")
    within = values if name in values or not isinstance(body, Mapping) else body
    return within.get(name)


def kind_of(error: DsmoeError) -> str:
    """Return the kind of failure under which the summary counts a line."""
    return error.kind if isinstance(error, RequestError) else describe(error)[0]
