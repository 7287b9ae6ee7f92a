"""Text files in messages: `@file` and /read.

A file comes before the message, as a code block with the file's name above it: models answer best if the
question follows the text. CR LF becomes LF.

`@name` in a message attaches the file `name`. If it does not exist, the word stays text, and is only reported
if it is clearly meant as a path (see `_meant_as_path`). Code blocks are not searched. A backslash before the
@ keeps the file from being attached, and is then removed.
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
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.base.text_files import decode_text

# os.path is used below, since pathlib raises for `~nobody`, and for names that are too long or have a NUL.
MAX_BYTES = 1 << 20
_LONGEST_NAME = 1024
_FRAME = re.compile(rf"([^\n]{{1,{_LONGEST_NAME}}}):\n(`{{3,}})\w*(?=\n)")
# No mention starts within an e-mail address. Code blocks are matched first, so that they are skipped.
_MENTION = re.compile(
    r"(?P<fenced>^ {0,3}(?:(?P<mark>`{3,})[^`\n]*|(?P<tildes>~{3,})[^\n]*)\n"
    r"(?:.*?^ {0,3}(?:(?P=mark)`*|(?P=tildes)~*)[ \t]*$|.*))"
    r"|\\?(?<![A-Za-z0-9._%+\-@])@"
    rf'(?:"(?P<quoted>[^"\n]+)"|(?P<word>[^\s"]{{1,{_LONGEST_NAME}}}))',
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
    """A text file. `name` is as written in the message."""

    name: str
    text: str

    @property
    def framed(self) -> str:
        """The file as it is put into the message."""
        return framed(self.name, self.text)


@dataclass(frozen=True, slots=True)
class Expanded:
    """A message as it is sent, the files in it, and the names of files that do not exist."""

    text: str
    files: tuple[Attachment, ...] = ()
    missing: tuple[str, ...] = ()


def expand(text: str) -> Expanded:
    """Return `text` with the files that it mentions: `@notes.txt`, `@~/notes.txt`, `@"my notes.txt"`.

    A mention is replaced by the name. Raises what `read_attachment` does.
    """
    files: dict[str, Attachment] = {}
    missing: list[str] = []

    def name_of(match: re.Match[str]) -> str:
        name, rest, exists = _mentioned(match)
        if name and match[0].startswith("\\"):
            return match[0][1:]
        if name and not exists:
            missing.append(name)
        if not exists:
            return match[0]
        if name not in files:
            files[name] = read_attachment(name)
        return name + rest

    message = _MENTION.sub(name_of, text)
    frames = (attachment.framed for attachment in files.values())
    return Expanded("\n\n".join([*frames, message]), tuple(files.values()), tuple(missing))


def escaped(text: str, *, before: str = "") -> str:
    """Return pasted `text` with a backslash before each @ that would attach a file. `before` precedes it."""

    def escape(match: re.Match[str]) -> str:
        pasted = match.start() >= len(before)
        return f"\\{match[0]}" if pasted and _mentioned(match)[0] else match[0]

    return _MENTION.sub(escape, before + text)[len(before) :]


def split_name(argument: str) -> tuple[str, str]:
    """Return the name of a file at the beginning of `argument`, and the text after it.

    A name with spaces may be in double quotes. Without quotes, it is the shortest name that exists, or ends
    at the first space. UsageError if there is no name.
    """
    match = _LEADING_NAME.match(argument)
    if match is None:
        raise UsageError("the name of a file is missing", remedy="/read FILE [QUESTION]")
    if match[1]:
        return match[1], argument[match.end() :].strip()
    longest = argument[:_LONGEST_NAME]
    for end in (*(space.start() for space in re.finditer(r"\s", longest)), len(longest)):
        if os.path.isfile(os.path.expanduser(argument[:end])):
            return argument[:end], argument[end:].strip()
    return match[0], argument[match.end() :].strip()


def read_attachment(name: str) -> Attachment:
    """Read a text file. FileError if it cannot be read, FormatError if it is not text, UsageError if it is
    too large.
    """
    where = safe_line(name)
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(os.path.expanduser(name), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError("this is not a regular file", where=where)
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"the file cannot be read: {reason}", where=where) from error
    if len(content) > MAX_BYTES:
        raise UsageError("the file is larger than 1 MiB", where=where, remedy="send the part that matters")
    return Attachment(name, decode_text(content, "the file", name).replace("\r\n", "\n"))


def describe(file: Attachment) -> str:
    """Return a line about a file that was attached."""
    return f"read {safe_line(file.name, 120)}: {count(len(file.text), 'character')}"


def _mentioned(match: re.Match[str]) -> tuple[str, str, bool]:
    """Return the name in a match, the text after it, and whether the file exists; "" for no name."""
    if match["fenced"]:
        return "", "", False
    for name, rest in _candidates(match):
        if os.path.isfile(os.path.expanduser(name)):
            return name, rest, True
    meant = match["quoted"] or _meant_as_path(match["word"])
    return meant, "", False


def _meant_as_path(word: str) -> str:
    """Return the path in a word that is clearly meant as one, or "".

    It begins like a path, ends like the name of a text file, or names a folder that exists.
    """
    name = word.rstrip(".,;:!?)]}>'`")
    parent = os.path.dirname(name)
    begins_or_ends = _PATH_START.match(name) or _TEXT_ENDING.search(name)
    return name if begins_or_ends or (parent and os.path.isdir(os.path.expanduser(parent))) else ""


def _candidates(match: re.Match[str]) -> Iterator[tuple[str, str]]:
    """Yield possible names and the text after each: a name may be followed by punctuation."""
    if match["quoted"]:
        yield match["quoted"], ""
        return
    word = match["word"]
    ends = (end for end in range(len(word) - 1, 0, -1) if _ends_a_name(word, end))
    for end in (len(word), *itertools.islice(ends, _MOST_CANDIDATES)):
        yield word[:end], word[end:]


def _ends_a_name(word: str, place: int) -> bool:
    """Return whether a name may end before this character."""
    character = word[place]
    if character in "._-~/":
        return character == "." and not any(letter.isalnum() for letter in word[place:])
    return character in "`<>|" or unicodedata.category(character).startswith("P")


def framed(name: str, text: str) -> str:
    """Return the text of a file as it is put into a message."""
    ending = Path(name).suffix.removeprefix(".")
    return f"{name}:\n{in_fence(text, ending if ending.isalnum() else '')}"


def in_fence(text: str, language: str = "") -> str:
    """Return `text` as a code block whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"


def without_files(message: str) -> str:
    """Return a message for previews: with the names of attached files instead of their content."""
    names: list[str] = []
    rest = message
    while (opening := _FRAME.match(rest)) is not None:
        # The fence is longer than any in the file.
        _, closing, behind = rest[opening.end() :].partition(f"\n{opening[2]}")
        if not closing or (behind and not behind.startswith("\n\n")):
            break
        names.append(f"[{opening[1]}]")
        rest = behind.removeprefix("\n\n")
    return " ".join([*names, rest.strip()]).strip() if names else message


def preview(message: str, limit: int) -> str:
    """Return the beginning of a message on one line of at most `limit` characters of safe text."""
    return safe_line(without_files(message).strip(), limit)
