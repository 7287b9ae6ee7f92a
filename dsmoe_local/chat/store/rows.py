"""Turns as rows of the database, and back."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.types import FinishReason, Usage

COLUMNS = ("role", "content", "token_ids", "vocabulary", "ending", "usage")


def row_of(turn: Turn, vocabulary: str) -> tuple[object, ...]:
    """The values of COLUMNS."""
    return (
        turn.role.value,
        storable(turn.content),
        pack(turn.token_ids) if turn.token_ids else None,
        vocabulary if turn.token_ids else None,
        None if turn.ending is None else turn.ending.value,
        None if turn.usage is None else json.dumps(asdict(turn.usage)),
    )


def turn_of(row: Sequence[Any], vocabulary: str) -> Turn:
    """The turn, without token ids that are of another vocabulary. ValueError if the row makes no sense."""
    role, content, token_ids, of_vocabulary, ending, usage = row
    if not isinstance(content, str):
        raise ValueError(f"content of the type {type(content).__name__}")
    try:
        return Turn(
            Role(role),
            content,
            unpack(token_ids) if token_ids is not None and of_vocabulary == vocabulary else (),
            None if ending is None else FinishReason(ending),
            None if usage is None else Usage(**json.loads(usage)),
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: half characters of a broken paste become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pack(token_ids: Iterable[int]) -> bytes:
    """32 bits each, little-endian."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> tuple[int, ...]:
    """The reverse of `pack`. ValueError for bytes that are not whole numbers."""
    token_ids = array("i")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return tuple(token_ids)
