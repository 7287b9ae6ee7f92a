"""GPT-2's spelling of bytes: each byte of a byte-level vocabulary is one printable character."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def byte_characters() -> dict[int, str]:
    """The character for each byte: itself where it is printable, else the next one from U+0100 on."""
    others = (byte for byte in range(256) if byte not in set(_PRINTABLE))
    return {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTES = {character: byte for byte, character in byte_characters().items()}


def decode(token: str) -> str | None:
    """The text that a byte-level token stands for; None if it is not whole UTF-8 or not byte-level."""
    try:
        return bytes(_BYTES[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def has_joined_digits(tokens: Iterable[str]) -> bool:
    """Whether some token holds two numeric characters side by side."""
    for token in tokens:
        text = decode(token)
        if text is not None and len(text) > 1:
            # \p{N} of the splitting rules: not the same as str.isnumeric, which knows Chinese numerals.
            numeric = [unicodedata.category(character)[0] == "N" for character in text]
            if any(first and second for first, second in pairwise(numeric)):
                return True
    return False
