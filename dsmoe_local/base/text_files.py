"""Text files that users name: decode what they contain, and write them as a whole."""

from __future__ import annotations

from pathlib import Path

from dsmoe_local.base.durable import write_file
from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line

_UTF16 = ("UTF-16 text", "convert it: iconv -f utf-16 -t utf-8 FILE")
_IMAGE = ("an image", "only text can be read")
_OFFICE = "save its content as text"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF", "convert it: pdftotext FILE -"),
    (b"PK\x03\x04", "a ZIP archive, as office documents are", _OFFICE),
    (b"\xd0\xcf\x11\xe0", "an office document", _OFFICE),
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip"),
    (b"PAR1", "a Parquet file", "dsmoe-batch reads it, by its name"),
    (b"GGUF", "a GGUF model", "to use it as the model: -m FILE"),
    (b"\x89PNG", *_IMAGE),
    (b"\xff\xd8\xff", *_IMAGE),
    (b"GIF8", *_IMAGE),
    (b"\xff\xfe", *_UTF16),
    (b"\xfe\xff", *_UTF16),
)
"""The first bytes of files that are not text, what they are, and the remedy."""


def refuse_other_kinds(beginning: bytes, what: str, where: str) -> None:
    """Raise FormatError if these first bytes of a file are those of a PDF, an image or another binary format.

    `what` names the content in the message.
    """
    for magic, kind, remedy in _KINDS:
        if beginning.startswith(magic):
            raise FormatError(f"{what} is {kind}, not UTF-8 text", where=safe_line(where), remedy=remedy)


def decode_text(content: bytes, what: str, where: str) -> str:
    """Decode UTF-8 and drop a byte order mark. Raises FormatError, in which `what` names the content."""
    refuse_other_kinds(content, what, where)
    try:
        # Editors on Windows write a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what} is not UTF-8 text",
            where=f"{safe_line(where)}, byte {error.start}",
            remedy="if it is text, try: iconv -f latin1 -t utf-8 FILE",
        ) from error
    if "\0" in text:
        raise FormatError(f"{what} is not text: it has NUL bytes", where=safe_line(where))
    return text


def write_text_file(path: Path, content: str, what: str) -> None:
    """Write a file that only its owner can read, replacing an existing one.

    Raises FileError, in which `what` names the content, if that is impossible.
    """
    try:
        # If the path is a link, its target is replaced, not the link.
        final = path.resolve()
        if final.exists() and not final.is_file():
            raise FileError("it is not an ordinary file", where=safe_line(str(path)))
        write_file(final, content.encode(), 0o600)
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a NUL in the name. RuntimeError: links that lead in a circle.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{what} cannot be written: {reason}", where=safe_line(str(path))) from error
