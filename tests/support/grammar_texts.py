"""Texts of a grammar: whether one belongs to it, and random ones that do, byte by byte."""

from __future__ import annotations

import random

import numpy as np

from dsmoe_local.engine.grammar.matcher import Matcher
from dsmoe_local.engine.grammar.network import CompiledRule

_CLOSING = b'"}]'


def belongs(root: CompiledRule, text: str | bytes) -> bool:
    """Whether the whole text is one of the grammar's."""
    matcher = Matcher(root)
    position = matcher.advance(matcher.start(), text.encode() if isinstance(text, str) else text)
    return position is not None and position.complete


def random_text(
    root: CompiledRule, rng: random.Random, *, patience: int = 60, limit: int = 4000
) -> bytes | None:
    """A text of the grammar; None if it comes to no end within `limit` bytes.

    After `patience` bytes it closes what it can.
    """
    matcher = Matcher(root)
    position = matcher.start()
    text = bytearray()
    while len(text) < limit:
        bytes_after = np.flatnonzero(position.first_bytes())
        if position.complete and (not len(bytes_after) or len(text) > patience or rng.random() < 0.2):
            return bytes(text)
        assert len(bytes_after), f"a dead end after {bytes(text)!r}"
        closing = [byte for byte in bytes_after if byte in _CLOSING]
        ascii_only = [byte for byte in bytes_after if byte < 128]
        if closing and (len(text) > patience or rng.random() < 0.2):
            byte = rng.choice(closing)
        elif ascii_only and rng.random() < 0.9:
            byte = rng.choice(ascii_only)
        else:
            byte = rng.choice(list(bytes_after))
        text.append(byte)
        behind = matcher.advance(position, bytes([byte]))
        assert behind is not None, f"a promised byte is refused after {bytes(text)!r}"
        position = behind
    return None
