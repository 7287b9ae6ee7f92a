"""The texts that models are measured on: a file, standard input, or the built-in one. Knows no tokens.

The built-in text needs no download: English and code are what this machine's Python ships, the Chinese prose
is this project's own. It differs between versions of Python, which its name therefore states.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dsmoe_local.base.content import decode_text
from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.evaluate.chinese import CHINESE

LICENCES = "English and code are Python's (PSF licence), the Chinese is this project's (MIT)"

# A little of each in turn, so that a few windows already show all three.
_ENGLISH, _CODE = 3000, 2500
_TOPICS = "pydoc_data.topics"
_DOCUMENTED = ("argparse", "asyncio", "collections", "datetime", "decimal", "functools", "pathlib", "re")
_SOURCES = ("bisect", "textwrap", "fnmatch", "heapq", "shlex")


@dataclass(frozen=True, slots=True)
class Text:
    """What to read, what to call it, and a digest of it: figures compare only on the same text."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """Tells texts apart."""
        return hashlib.blake2b(self.content.encode(), digest_size=8).hexdigest()


def read_text(source: str | None) -> Text:
    """A file's text, standard input's (`-`), or the built-in one (None). FileError, FormatError.

    One newline at the end is left out, as llama.cpp's tools do.
    """
    if source is None:
        return built_in()
    name = "standard input" if source == "-" else safe_line(Path(source).name, 80)
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except IsADirectoryError as error:
        raise FileError("this is a folder, not a text", where=source, remedy="name a file in it") from error
    except OSError as error:
        raise FileError(f"the text cannot be read: {error.strerror}", where=source) from error
    content = decode_text(raw, "the text", source).removesuffix("\n")
    if not content.strip():
        raise FormatError("the text is empty", where=source)
    return Text(name, content)


def built_in() -> Text:
    """English, Chinese and code, in turn."""
    english, code = _english(), _code()
    parts = []
    for chinese in CHINESE.strip().split("\n\n"):
        parts += [_take(english, _ENGLISH), chinese, _take(code, _CODE)]
    return Text(f"built-in, Python {platform.python_version()}", "\n\n".join(filter(None, parts)))


def _take(paragraphs: Iterator[str], n_characters: int) -> str:
    """As many paragraphs as make up so many characters."""
    taken: list[str] = []
    length = 0
    while length < n_characters:
        paragraph = next(paragraphs, None)
        if paragraph is None:
            break
        taken.append(paragraph)
        length += len(paragraph) + 2
    return "\n\n".join(taken)


def _paragraphs(text: str) -> Iterator[str]:
    return (paragraph for part in text.split("\n\n") if (paragraph := part.strip("\n").rstrip()))


def _english() -> Iterator[str]:
    """Python's own manual; without it (some systems leave it out), what modules say about themselves."""
    if find_spec(_TOPICS.partition(".")[0]) is not None:
        topics: dict[str, str] = importlib.import_module(_TOPICS).topics
        for name in sorted(topics):
            yield from _paragraphs(topics[name])
    for name in _DOCUMENTED:
        yield from _paragraphs(importlib.import_module(name).__doc__ or "")


def _code() -> Iterator[str]:
    """The source of modules, which are not imported."""
    for name in _SOURCES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield from _paragraphs(Path(spec.origin).read_text(encoding="utf-8"))
