"""Text files inside messages: `@file` and /read. Finds, checks and frames them; sends nothing.

A file's content comes before the message, in a fence that it cannot close, with its name above: models read a
question best behind what it is about. Line ends of Windows become plain ones.

`@name` in a message attaches the file of that name. If there is none, it stays text, and is reported missing
only if it is clearly meant as a path (see `_meant_as_path`). Fenced code is not searched. A backslash
before the @ keeps it from naming a file, and is removed where it did so.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.base.text_files import decode_text
from dsmoe_local.chat import words
from dsmoe_local.chat.frames import LONGEST_NAME, framed

MAX_BYTES = 1 << 20
# Not after what may be the beginning of an e-mail address. Fenced code comes first: it is skipped as a whole.
_MENTION = re.compile(
    r"(?P<fenced>^ {0,3}(?:(?P<mark>`{3,})[^`\n]*|(?P<tildes>~{3,})[^\n]*)\n"
    r"(?:.*?^ {0,3}(?:(?P=mark)`*|(?P=tildes)~*)[ \t]*$|.*))"
    r"|\\?(?<![A-Za-z0-9._%+\-@])@"
    rf'(?:"(?P<quoted>[^"\n]+)"|(?P<word>[^\s"]{{1,{LONGEST_NAME}}}))',
    re.DOTALL | re.MULTILINE,
)
_PATH_START = re.compile(r"(?:\.{0,2}|~[\w.-]*)/\w")
_TEXT_ENDING = re.compile(
    r"\w\.(?:c|cc|cfg|conf|cpp|cs|css|csv|go|h|hpp|html|ini|ipynb|java|js|json|jsonl|jsx|kt|log|lua|md|php|py|rb"
    r"|rs|rst|sh|sql|svg|swift|tex|toml|ts|tsv|tsx|txt|xml|yaml|yml)$",
    re.IGNORECASE,
)
_MOST_CANDIDATES = 16
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
    mention stays the name. Raises what `read_attachment` does.
    """
    files: dict[str, Attachment] = {}
    missing: list[str] = []

    def name_of(match: re.Match[str]) -> str:
        name, rest, exists = _mentioned(match, folder)
        if name and match[0].startswith("\\"):
            return match[0][1:]
        if name and not exists:
            missing.append(name)
        if not exists:
            return match[0]
        if name not in files:
            files[name] = read_attachment(name, folder)
        return name + rest

    message = _MENTION.sub(name_of, text)
    frames = (attachment.framed for attachment in files.values())
    return Expanded("\n\n".join([*frames, message]), tuple(files.values()), tuple(missing))


def escaped(text: str, folder: Path | None = None, *, before: str = "") -> str:
    """`text` with a backslash before each @ that would name a file, so that `expand` gives back `text`.

    For text that is pasted: what is typed names files, code does not. `before` is what stands before it.
    """

    def escape(match: re.Match[str]) -> str:
        pasted = match.start() >= len(before)
        return f"\\{match[0]}" if pasted and _mentioned(match, folder)[0] else match[0]

    return _MENTION.sub(escape, before + text)[len(before) :]


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
        if os.path.isfile(_path(argument[:end], folder)):
            return argument[:end], argument[end:].strip()
    return match[0], argument[match.end() :].strip()


def read_attachment(name: str, folder: Path | None = None) -> Attachment:
    """The text of a file. FileError if it cannot be read, FormatError if it is no text, UsageError if it is
    too large.
    """
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
    return Attachment(name, decode_text(content, "the file", name).replace("\r\n", "\n"))


def describe(file: Attachment) -> str:
    """What was read, for people."""
    return f"read {safe_line(file.name, 120)}: {words.count(len(file.text), 'character')}"


def _mentioned(match: re.Match[str], folder: Path | None) -> tuple[str, str, bool]:
    """The name in a mention, what follows it, and whether there is such a file. No name: it mentions none."""
    if match["fenced"]:
        return "", "", False
    for name, rest in _candidates(match):
        if os.path.isfile(_path(name, folder)):
            return name, rest, True
    meant = match["quoted"] or _meant_as_path(match["word"], folder)
    return meant, "", False


def _meant_as_path(word: str, folder: Path | None) -> str:
    """The path that a word without a file is clearly meant as, or "": one that begins like a path, ends like
    the name of a text file, or lies in a folder that exists.
    """
    name = word.rstrip(".,;:!?)]}>'`")
    parent = os.path.dirname(name)
    begins_or_ends = _PATH_START.match(name) or _TEXT_ENDING.search(name)
    return name if begins_or_ends or (parent and os.path.isdir(_path(parent, folder))) else ""


def _candidates(match: re.Match[str]) -> Iterator[tuple[str, str]]:
    """What the name could be, and what then follows it: sentences go on behind names."""
    if match["quoted"]:
        yield match["quoted"], ""
        return
    word = match["word"]
    ends = (end for end in range(len(word) - 1, 0, -1) if _ends_a_name(word, end))
    for end in (len(word), *itertools.islice(ends, _MOST_CANDIDATES)):
        yield word[:end], word[end:]


def _ends_a_name(word: str, place: int) -> bool:
    """Whether a name may end before this character: dots and such only where nothing of a name follows."""
    character = word[place]
    if character in "._-~/":
        return character == "." and not any(letter.isalnum() for letter in word[place:])
    return character in "`<>|" or unicodedata.category(character).startswith("P")


def _path(name: str, folder: Path | None) -> str:
    # Of os.path, not of pathlib, which raises: for `~nobody`, for names too long or with a NUL.
    return os.path.join(folder or "", os.path.expanduser(name))
