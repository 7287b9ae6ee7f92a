"""Bytes that are to be text: decoded, or refused in words that say what they are instead."""

from __future__ import annotations

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line

_UTF16 = ("UTF-16 text", "iconv -f utf-16 -t utf-8 FILE makes UTF-8 of it")
_IMAGE = ("an image", "only text can be read")
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF", "pdftotext FILE - makes text of it"),
    (b"PK\x03\x04", "a ZIP archive, as office documents are", "save its content as text"),
    (b"\xd0\xcf\x11\xe0", "an office document", "save its content as text"),
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip"),
    (b"GGUF", "a GGUF model", "a model goes behind -m"),
    (b"\x89PNG", *_IMAGE),
    (b"\xff\xd8\xff", *_IMAGE),
    (b"GIF8", *_IMAGE),
    (b"\xff\xfe", *_UTF16),
    (b"\xfe\xff", *_UTF16),
)
"""How files begin that are no text, what they are, and what to do."""


def refuse_other_kinds(beginning: bytes, what: str, where: str) -> None:
    """FormatError, which calls it `what`, for content that begins as something else than text does."""
    for magic, kind, remedy in _KINDS:
        if beginning.startswith(magic):
            raise FormatError(f"{what} is {kind}, not UTF-8 text", where=safe_line(where), remedy=remedy)


def decode_text(content: bytes, what: str, where: str) -> str:
    """The text that `content` is in UTF-8, without a byte order mark. FormatError, which calls it `what`, if
    it is none.
    """
    refuse_other_kinds(content, what, where)
    try:
        # Editors of Windows begin files with a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what} is not UTF-8 text",
            where=f"{safe_line(where)}, byte {error.start}",
            remedy="if it is text, iconv -f latin1 -t utf-8 FILE may help",
        ) from error
    if "\0" in text:
        raise FormatError(f"{what} is not text: it has NUL bytes", where=safe_line(where))
    return text
