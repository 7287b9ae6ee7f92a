"""GPT-2's byte-level encoding: each byte of a token is one printable character."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def byte_characters() -> dict[int, str]:
    """Return the character of each byte: itself if it is printable, otherwise the next one from U+0100 on."""
    others = (byte for byte in range(256) if byte not in set(_PRINTABLE))
    return {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTES = {character: byte for byte, character in byte_characters().items()}


def decode(token: str) -> str | None:
    """Return the text of a byte-level token; None if it is not byte-level, or its bytes are not UTF-8."""
    try:
        return bytes(_BYTES[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def has_joined_digits(tokens: Iterable[str]) -> bool:
    """True if a token contains two adjacent numeric characters."""
    for token in tokens:
        text = decode(token)
        if text is not None and len(text) > 1:
            # \p{N} of the splitting rules. str.isnumeric is not the same: it includes Chinese numerals.
            numeric = [unicodedata.category(character)[0] == "N" for character in text]
            if any(first and second for first, second in pairwise(numeric)):
                return True
    return False
