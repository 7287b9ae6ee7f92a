"""Rows of the database as data, and back: one reader for each table, which believes nothing.

All readers raise `values.DamagedRowError` for a row that makes no sense.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from dsmoe_local.base.config_file import Value
from dsmoe_local.chat.store.state_files import DIGEST_BYTES, is_name
from dsmoe_local.chat.store.values import (
    DamagedRowError,
    blob,
    check_seal,
    integer,
    moment,
    optional_integer,
    optional_text,
    real,
    text,
)
from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.types import FinishReason, Usage

_SESSION_SEALED = (
    *("number", "name", "key", "tree", "head", "revision", "system", "n_left_out", "n_shifted", "title"),
    *("model", "updated", "undone", "model_path", "settings"),
)
SESSION_COLUMNS = ", ".join(f"session.{name}" for name in (*_SESSION_SEALED, "seal"))
WRITTEN = ("role", "content", "token_ids", "vocabulary", "ending", "usage")
"""What of a turn's row its turn says: the columns of `row_of`."""
TURN_PLACE = ("parent", "tree", "depth", "created")
"""What of a turn's row says where it stands."""
TURN_COLUMNS = ", ".join(f"turn.{name}" for name in ("id", *TURN_PLACE, *WRITTEN, "seal"))
STATE_COLUMNS = (
    "state.file, state.session, state.fingerprint, state.prefix, state.n_tokens, state.n_bytes, state.digest,"
    " state.used"
)


Settings: TypeAlias = Mapping[str, Value]
"""What /set chose in a session, by the keys of the config file."""


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
    """A row of the table `turn`. `created` in seconds since 1970; its token ids are of `vocabulary`."""

    id: int
    tree: int
    depth: int
    created: float
    vocabulary: str | None
    turn: Turn


@dataclass(frozen=True, slots=True)
class StateRow:
    """A row of the table `state`: what a file in the folder of states is, and when it was last `used`.
    `prefix` is a digest of the first `n_tokens` tokens of a conversation, the last of which are the file's.
    """

    file: str
    session: int
    fingerprint: str
    prefix: bytes
    n_tokens: int
    n_bytes: int
    digest: bytes
    used: float


def session_of(row: Sequence[Any]) -> SessionRow:
    """The values of SESSION_COLUMNS, checked."""
    *values, seal = row
    number, name, key, tree, head, revision, system, n_left_out, n_shifted, title, model, *more = values
    updated, undone, model_path, settings = more
    check_seal(f"session {number}", seal, values)
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


def turn_of(row: Sequence[Any]) -> TurnRow:
    """The values of TURN_COLUMNS, checked."""
    turn_id, *values, seal = row
    parent, tree, depth, created, *said = values
    check_seal(f"turn {turn_id}", seal, values)
    if (parent is None) != (depth == 1):
        raise DamagedRowError(f"turn {turn_id} has the parent {parent} and the depth {depth}")
    return TurnRow(
        integer("id", turn_id, 1),
        integer("tree", tree),
        integer("depth", depth, 1),
        moment("created", created),
        *said_of(said),
    )


def said_of(row: Sequence[Any]) -> tuple[str | None, Turn]:
    """The values of WRITTEN, checked: the vocabulary of the token ids, and the turn."""
    role, content, token_ids, vocabulary, ending, usage = row
    try:
        return optional_text("vocabulary", vocabulary), Turn(
            Role(role),
            text("content", content),
            () if token_ids is None else unpack(token_ids),
            None if ending is None else FinishReason(ending),
            None if usage is None else _usage(text("usage", usage)),
        )
    except (ValueError, RecursionError) as error:
        raise DamagedRowError(str(error)) from error


def state_of(row: Sequence[Any]) -> StateRow:
    """The values of STATE_COLUMNS, checked."""
    file, session, fingerprint, prefix, n_tokens, n_bytes, digest, used = row
    if not is_name(file):
        raise DamagedRowError("file is no state's name")
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


def row_of(turn: Turn, vocabulary: str) -> tuple[object, ...]:
    """The values of WRITTEN."""
    return (
        turn.role.value,
        storable(turn.content),
        pack(turn.token_ids) if turn.token_ids else None,
        vocabulary if turn.token_ids else None,
        None if turn.ending is None else turn.ending.value,
        None if turn.usage is None else json.dumps(asdict(turn.usage)),
    )


def settings_text(settings: Settings | None) -> str | None:
    """Settings as the table has them."""
    return None if settings is None else json.dumps(dict(settings), sort_keys=True)


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: half characters of a broken paste become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pack(token_ids: Iterable[int]) -> bytes:
    """32 bits each, little-endian."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: object) -> tuple[int, ...]:
    """The reverse of `pack`. DamagedRowError for what it cannot have made of token ids."""
    token_ids = array("i")
    content = blob("token_ids", packed)
    if len(content) % token_ids.itemsize:
        raise DamagedRowError(f"token_ids has {len(content)} bytes")
    token_ids.frombytes(content)
    if sys.byteorder == "big":
        token_ids.byteswap()
    if token_ids and min(token_ids) < 0:
        raise DamagedRowError("token_ids has a negative one")
    return tuple(token_ids)


def _settings(stored: str) -> Settings:
    try:
        values = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise DamagedRowError(f"settings are no JSON: {error}") from error
    if not isinstance(values, dict) or not all(map(_is_value, values.values())):
        raise DamagedRowError("settings hold what is no value")
    return values


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float | bool)


def _usage(stored: str) -> Usage:
    values = json.loads(stored)
    if not isinstance(values, dict) or {field.name for field in fields(Usage)} != values.keys():
        raise DamagedRowError("usage has other fields")
    return Usage(
        integer("prompt_tokens", values["prompt_tokens"]),
        integer("cached_tokens", values["cached_tokens"]),
        integer("completion_tokens", values["completion_tokens"]),
        real("prompt_seconds", values["prompt_seconds"]),
        real("completion_seconds", values["completion_seconds"]),
        optional_integer("seed", values["seed"]),
    )
