"""Rows of the database as Python objects: validated when they are read, since a damaged database may hold
anything in any column.

Functions that read raise DamagedRowError for an invalid row.
"""

from __future__ import annotations

import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from typing import Any, TypeAlias

from dsmoe_local.base.config_file import Value
from dsmoe_local.base.text import is_encodable, whole_characters
from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.types import FinishReason, Usage

DIGEST_BYTES = 32  # of KV states
_STATE_FILE = re.compile(r"[0-9a-f]{16}\.state")
_MOST = 2**63 - 1
_LATEST = 253_402_000_000.0  # seconds since 1970: the year 9999, the last that Python can show


class DamagedRowError(ValueError):
    """A row has invalid values. `Database` raises it as a FormatError."""


def seal_of(values: Iterable[object]) -> bytes:
    """Return a digest of a row's values. It detects damage that leaves valid values."""
    digest = blake2b(digest_size=16)
    for value in values:
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogateescape")
        content = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(b"%s %d " % (type(value).__name__.encode(), len(content)) + content)
    return digest.digest()


def turn_seal_of(values: Sequence[object]) -> bytes:
    """Return the seal of a row that ends with TURN_CONTENT. Older seals do not include `reasoning`."""
    *older, reasoning = values
    return seal_of(older if reasoning is None else values)


def check_seal(name: str, seal: object, expected: bytes) -> None:
    """Raise DamagedRowError unless a row has the expected seal. Rows without a seal (None) pass."""
    if seal is not None and seal != expected:
        raise DamagedRowError(f"{name} has a wrong checksum")


def integer(name: str, value: object, least: int = 0) -> int:
    """Return an integer of at least `least`."""
    if type(value) is not int or not least <= value <= _MOST:
        raise _wrong(name, value)
    return value


def optional_integer(name: str, value: object, least: int = 0) -> int | None:
    """Return an integer of at least `least`, or None."""
    return None if value is None else integer(name, value, least)


def real(name: str, value: object) -> float:
    """Return a finite number of at least 0."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise _wrong(name, value)
    return float(value)  # type: ignore[arg-type]


def moment(name: str, value: object) -> float:
    """Return a time in seconds since 1970, which can be shown as a date."""
    if (seconds := real(name, value)) > _LATEST:
        raise _wrong(name, value)
    return seconds


def text(name: str, value: object) -> str:
    """Return a text."""
    # `Database` reads invalid UTF-8 as lone surrogates.
    if not isinstance(value, str) or not is_encodable(value):
        raise _wrong(name, value)
    return value


def optional_text(name: str, value: object) -> str | None:
    """Return a text, or None."""
    return None if value is None else text(name, value)


def blob(name: str, value: object, n_bytes: int | None = None) -> bytes:
    """Return bytes, of length `n_bytes` unless that is None."""
    if not isinstance(value, bytes) or n_bytes not in (None, len(value)):
        raise _wrong(name, value)
    return value


def _wrong(name: str, value: object) -> DamagedRowError:
    shown = "" if isinstance(value, str | bytes) else f" {str(value)[:40]}"
    return DamagedRowError(f"{name} has an invalid value{shown}")


_SESSION_SEALED = (
    *("number", "name", "key", "tree", "head", "revision", "system", "n_left_out", "n_shifted", "title"),
    *("model", "updated", "undone", "model_path", "settings"),
)
SESSION_COLUMNS = ", ".join(f"session.{name}" for name in (*_SESSION_SEALED, "seal"))
TURN_CONTENT = ("role", "content", "token_ids", "vocabulary", "ending", "usage", "reasoning")
"""The columns of a turn's content."""
TURN_POSITION = ("parent", "tree", "depth", "created")
"""The columns of a turn's place in the tree."""
TURN_COLUMNS = ", ".join(f"turn.{name}" for name in ("id", *TURN_POSITION, *TURN_CONTENT, "seal"))
STATE_COLUMNS = (
    "state.file, state.session, state.fingerprint, state.prefix, state.n_tokens, state.n_bytes, state.digest,"
    " state.used"
)


Settings: TypeAlias = Mapping[str, Value]
"""The settings that /set changed in a session, by the keys of the config file."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A row of the table `session`. `updated` in seconds since 1970."""

    number: int
    name: str
    key: str
    tree: int
    head: int | None
    revision: int
    system: str
    n_left_out: int
    n_shifted: int
    title: str
    model: str
    updated: float
    undone: int | None
    model_path: str | None
    settings: Settings | None


@dataclass(frozen=True, slots=True)
class TurnRow:
    """A row of the table `turn`. `created` in seconds since 1970; `vocabulary` is that of the token ids."""

    id: int
    tree: int
    depth: int
    created: float
    vocabulary: str | None
    turn: Turn


@dataclass(frozen=True, slots=True)
class StateRow:
    """A row of the table `state`: one file with the KV state of a block of tokens.

    `prefix` is a digest of the `n_tokens` tokens of the conversation up to the end of the block, `digest` one
    of the file. `used` in seconds since 1970.
    """

    file: str
    session: int
    fingerprint: str
    prefix: bytes
    n_tokens: int
    n_bytes: int
    digest: bytes
    used: float


def read_session(row: Sequence[Any]) -> SessionRow:
    """Return a row with SESSION_COLUMNS as an object."""
    *values, seal = row
    number, name, key, tree, head, revision, system, n_left_out, n_shifted, title, model, *more = values
    updated, undone, model_path, settings = more
    check_seal(f"session {number}", seal, seal_of(values))
    return SessionRow(
        integer("number", number, 1),
        text("name", name),
        text("key", key),
        integer("tree", tree),
        optional_integer("head", head, 1),
        integer("revision", revision),
        text("system", system),
        integer("n_left_out", n_left_out),
        integer("n_shifted", n_shifted),
        text("title", title),
        text("model", model),
        moment("updated", updated),
        optional_integer("undone", undone, 1),
        optional_text("model_path", model_path),
        None if settings is None else _settings(text("settings", settings)),
    )


def read_turn(row: Sequence[Any]) -> TurnRow:
    """Return a row with TURN_COLUMNS as an object."""
    turn_id, *values, seal = row
    parent, tree, depth, created, *said = values
    check_seal(f"turn {turn_id}", seal, turn_seal_of(values))
    if (parent is None) != (depth == 1):
        raise DamagedRowError(f"turn {turn_id} has the parent {parent} and the depth {depth}")
    return TurnRow(
        integer("id", turn_id, 1),
        integer("tree", tree),
        integer("depth", depth, 1),
        moment("created", created),
        *read_content(said),
    )


def read_content(row: Sequence[Any]) -> tuple[str | None, Turn]:
    """Return the vocabulary and the turn of a row with TURN_CONTENT."""
    role, content, token_ids, vocabulary, ending, usage, reasoning = row
    try:
        return optional_text("vocabulary", vocabulary), Turn(
            Role(role),
            text("content", content),
            () if token_ids is None else unpack_ids(token_ids),
            None if ending is None else FinishReason(ending),
            None if usage is None else _usage(text("usage", usage)),
            "" if reasoning is None else text("reasoning", reasoning),
        )
    except (ValueError, RecursionError) as error:
        raise DamagedRowError(str(error)) from error


def is_state_file(value: object) -> bool:
    """Return whether a value is the name of a state's file, and no path or other file's name."""
    return isinstance(value, str) and _STATE_FILE.fullmatch(value) is not None


def read_state(row: Sequence[Any]) -> StateRow:
    """Return a row with STATE_COLUMNS as an object."""
    file, session, fingerprint, prefix, n_tokens, n_bytes, digest, used = row
    if not is_state_file(file):
        raise DamagedRowError("file is not the name of a state file")
    return StateRow(
        file,
        integer("session", session, 1),
        text("fingerprint", fingerprint),
        blob("prefix", prefix, DIGEST_BYTES),
        integer("n_tokens", n_tokens, 1),
        integer("n_bytes", n_bytes),
        blob("digest", digest, DIGEST_BYTES),
        real("used", used),
    )


def turn_values(turn: Turn, vocabulary: str) -> tuple[object, ...]:
    """Return the values of TURN_CONTENT for a turn."""
    return (
        turn.role.value,
        whole_characters(turn.content),
        pack_ids(turn.token_ids) if turn.token_ids else None,
        vocabulary if turn.token_ids else None,
        None if turn.ending is None else turn.ending.value,
        None if turn.usage is None else json.dumps(asdict(turn.usage)),
        whole_characters(turn.reasoning) or None,
    )


def settings_json(settings: Settings | None) -> str | None:
    """Return settings as they are stored."""
    return None if settings is None else json.dumps(dict(settings), sort_keys=True)


def pack_ids(token_ids: Iterable[int]) -> bytes:
    """Return token ids as bytes: 32 bits each, little-endian."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: object) -> tuple[int, ...]:
    """Return the token ids in the bytes of `pack_ids`. DamagedRowError if they are invalid."""
    token_ids = array("i")
    content = blob("token_ids", packed)
    if len(content) % token_ids.itemsize:
        raise DamagedRowError(f"token_ids has {len(content)} bytes, not a multiple of {token_ids.itemsize}")
    token_ids.frombytes(content)
    if sys.byteorder == "big":
        token_ids.byteswap()
    if token_ids and min(token_ids) < 0:
        raise DamagedRowError("token_ids contains a negative id")
    return tuple(token_ids)


def _settings(stored: str) -> Settings:
    try:
        values = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise DamagedRowError(f"settings are not valid JSON: {error}") from error
    if not isinstance(values, dict) or not all(map(_is_value, values.values())):
        raise DamagedRowError("settings have an invalid value")
    return values


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float | bool)


def _usage(stored: str) -> Usage:
    values = json.loads(stored)
    # Usage of older versions has no reasoning tokens.
    values = {"reasoning_tokens": 0, **values} if isinstance(values, dict) else {}
    if {field.name for field in fields(Usage)} != values.keys():
        raise DamagedRowError("usage has unknown or missing fields")
    return Usage(
        integer("prompt_tokens", values["prompt_tokens"]),
        integer("cached_tokens", values["cached_tokens"]),
        integer("completion_tokens", values["completion_tokens"]),
        real("prompt_seconds", values["prompt_seconds"]),
        real("completion_seconds", values["completion_seconds"]),
        optional_integer("seed", values["seed"]),
        integer("reasoning_tokens", values["reasoning_tokens"]),
    )
