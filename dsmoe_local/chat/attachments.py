"""Text files inside messages: `@file` and /read. Finds, checks and frames them; sends nothing.

A file's content comes before the message, in a fence that it cannot close, with its name above: models read a
question best behind what it is about. Line ends of Windows become plain ones.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat import words
from dsmoe_local.chat.frames import LONGEST_NAME, framed

MAX_BYTES = 1 << 20
# Not after what may be the beginning of an e-mail address.
_MENTION = re.compile(rf'(?<![A-Za-z0-9._%+\-@])@(?:"([^"\n]+)"|([^\s"]{{1,{LONGEST_NAME}}}))')
_LEADING_NAME = re.compile(r'"([^"\n]+)"(?=\s|$)|(\S+)')


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file's text, and its name as it was written in the message."""

    name: str
    text: str

    @property
    def framed(self) -> str:
        """The text with its name, as the model reads it."""
        return framed(self.name, self.text)


@dataclass(frozen=True, slots=True)
class Expanded:
    """A message as it is sent, the files in it, and what was meant as one but is not there."""

    text: str
    files: tuple[Attachment, ...] = ()
    missing: tuple[str, ...] = ()


def expand(text: str, folder: Path | None = None) -> Expanded:
    """`text` with the files that it mentions: `@notes.txt`, `@~/notes.txt`, `@"my notes.txt"`.

    Names are relative to `folder` (None: the current one). An @word that is no file stays text; in place of a
    mention stays the name. FileError for a file that cannot be read as text, UsageError for one too large.
    """
    files: dict[str, Attachment] = {}

    def name_of(match: re.Match[str]) -> str:
        for name, rest in _candidates(match):
            if _is_file(_path(name, folder)):
                if name not in files:
                    files[name] = read_attachment(name, folder)
                return name + rest
        if _looks_like_a_file(match):
            missing.append(match[1] or match[2])
        return match[0]

    missing: list[str] = []
    message = _MENTION.sub(name_of, text)
    if not files:
        return Expanded(text, missing=tuple(missing))
    frames = (attachment.framed for attachment in files.values())
    return Expanded("\n\n".join([*frames, message]), tuple(files.values()), tuple(missing))


def split_name(argument: str, folder: Path | None = None) -> tuple[str, str]:
    """The name of a file at the beginning of `argument`, and what follows it.

    A name with spaces may be in double quotes; without them it is as short as a file's name can be. What is
    no file's name at all is taken to its first space. UsageError without a name.
    """
    match = _LEADING_NAME.match(argument)
    if match is None:
        raise UsageError("a file's name is missing")
    if match[1]:
        return match[1], argument[match.end() :].strip()
    longest = argument[:LONGEST_NAME]
    for end in (*(space.start() for space in re.finditer(r"\s", longest)), len(longest)):
        if _is_file(_path(argument[:end], folder)):
            return argument[:end], argument[end:].strip()
    return match[0], argument[match.end() :].strip()


def read_attachment(name: str, folder: Path | None = None) -> Attachment:
    """The text of a file. FileError if it cannot be read or is no text, UsageError if it is too large."""
    where = safe_line(name)
    try:
        # A pipe without a writer would be waited for.
        descriptor = os.open(_path(name, folder), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError("this is no ordinary file", where=where)
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"the file cannot be read: {reason}", where=where) from error
    if len(content) > MAX_BYTES:
        raise UsageError("the file is larger than 1 MiB", where=where, remedy="send the part that matters")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError("the file is no text: not UTF-8", where=f"{where}, byte {error.start}") from error
    if "\0" in text:
        raise FileError("the file is no text: it has NUL bytes", where=where)
    return Attachment(name, text.replace("\r\n", "\n"))


def describe(file: Attachment) -> str:
    """What was read, for people."""
    return f"read {safe_line(file.name, 120)}: {words.count(len(file.text), 'character')}"


def _looks_like_a_file(match: re.Match[str]) -> bool:
    """Whether a mention of what is not there was meant as a file: it is quoted, a path, or has an ending."""
    return bool(match[1]) or "/" in match[2] or bool(re.search(r"\w\.\w{1,5}\b", match[2]))


def _candidates(match: re.Match[str]) -> Iterator[tuple[str, str]]:
    """What the name could be, and what then follows it: sentences go on behind names."""
    if match[1]:
        yield match[1], ""
        return
    word = match[2]
    yield word, ""
    for end in range(len(word) - 1, 0, -1):
        if _ends_a_name(word, end):
            yield word[:end], word[end:]


def _ends_a_name(word: str, place: int) -> bool:
    """Whether a name may end before this character: dots and such only where nothing of a name follows."""
    character = word[place]
    if character in "._-~/":
        return character == "." and not any(letter.isalnum() for letter in word[place:])
    return character in "`<>|" or unicodedata.category(character).startswith("P")


def _path(name: str, folder: Path | None) -> Path:
    # Not Path.expanduser, which raises for `~nobody`.
    return (folder or Path()) / os.path.expanduser(name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name too long, or with a NUL.
        return False
