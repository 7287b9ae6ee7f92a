"""Tests texts against a grammar without a model: the vocabulary is the 256 bytes and an end token."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np

from dsmoe_local.engine.sampling.constraint import CompiledGrammar, Constraint, Vocabulary, compiled
from dsmoe_local.engine.tools.calls import Tools
from dsmoe_local.engine.tools.formats import ToolFormat

END = 256
_NUMBERS = np.arange(END + 1, dtype=np.float32)


@cache
def _byte_vocabulary() -> Vocabulary:
    return Vocabulary([*(bytes([value]) for value in range(END)), b""], [END])


def gbnf(text: str) -> CompiledGrammar:
    """Compile a GBNF grammar over bytes."""
    return compiled(_byte_vocabulary(), text, None)


def schema(value: Any) -> CompiledGrammar:
    """Compile a JSON schema over bytes."""
    return compiled(_byte_vocabulary(), None, value if isinstance(value, str) else json.dumps(value))


def tools(form: ToolFormat, offered: Tools, json_schema: str | None = None) -> CompiledGrammar:
    """Compile the grammar of replies with tool calls over bytes."""
    return compiled(_byte_vocabulary(), None, json_schema, (form, offered))


def belongs(grammar: CompiledGrammar, text: str | bytes) -> bool:
    """Return whether the text matches the grammar."""
    constraint = Constraint(grammar)
    for byte in text.encode() if isinstance(text, str) else text:
        if not constraint.permits(byte):
            return False
        constraint.accept(byte)
    return constraint.permits(END)


def permitted(grammar: CompiledGrammar, text: bytes) -> list[int]:
    """Return the bytes that may follow a prefix of a text, and END if the text may end there."""
    constraint = Constraint(grammar)
    for byte in text:
        constraint.accept(byte)
    return sorted(map(int, constraint.likeliest(_NUMBERS, len(_NUMBERS))))


def random_text(
    grammar: CompiledGrammar, rng: random.Random, *, patience: int = 60, limit: int = 4000
) -> bytes | None:
    """A text of the grammar; None if it comes to no end within `limit` bytes.

    After `patience` bytes it closes what it can.
    """
    constraint = Constraint(grammar)
    text = bytearray()
    while len(text) < limit:
        following = list(map(int, constraint.likeliest(_NUMBERS, len(_NUMBERS))))
        late = len(text) > patience
        if following == [END] or (END in following and (late or rng.random() < 0.2)):
            return bytes(text)
        following = [byte for byte in following if byte != END]
        closing = [byte for byte in following if byte in b'"}]']
        ascii_only = [byte for byte in following if byte < 128]
        if closing and (late or rng.random() < 0.2):
            byte = rng.choice(closing)
        elif ascii_only and rng.random() < 0.9:
            byte = rng.choice(ascii_only)
        else:
            byte = rng.choice(following)
        constraint.accept(byte)
        text.append(byte)
    return None
