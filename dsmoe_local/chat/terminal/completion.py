"""What Tab offers: slash commands, what a command takes, names of files. Knows no terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from dsmoe_local.chat.commands.declare import Chat, Command, Commands

_MOST = 200
_MENTION = re.compile(r'(?:^|(?<=\s))@("[^"\n]*|[^\s"]*)$')


@dataclass(frozen=True, slots=True)
class Choice:
    """A completion: `text` takes the place of the last `replaces` characters; `shown` stands in the menu."""

    text: str
    replaces: int = 0
    help: str = ""
    shown: str = ""


Complete: TypeAlias = Callable[[str], Iterable[Choice]]
"""Takes what is typed up to the cursor; quick, and called in the thread that reads keys."""


def nothing(before: str) -> Iterable[Choice]:
    """The completion of a terminal without one."""
    return ()


def choices(before: str, commands: Commands, chat: Chat) -> Iterator[Choice]:
    """What `before`, the input up to the cursor, could become."""
    mention = _MENTION.search(before)
    if before.startswith("/") and "\n" not in before:
        name, space, typed = before[1:].partition(" ")
        if not space:
            yield from _names(name, commands)
        elif (command := _command(name, commands)) is not None:
            yield from _arguments(command, typed.lstrip(" "), chat)
    elif mention:
        yield from files(mention[1])


def files(typed: str) -> Iterator[Choice]:
    """Names of files and folders that begin as the word `typed`; a quote before it allows spaces in them."""
    word = typed.removeprefix('"')
    head, _, start = word.rpartition("/")
    # Not Path.expanduser, which raises for `~nobody`.
    folder = os.path.expanduser(f"{head}/" if "/" in word else ".")
    for name, is_folder in _entries(folder, start):
        path = f"{word[: len(word) - len(start)]}{name}{'/' if is_folder else ''}"
        quoted = " " in path or typed.startswith('"')
        closing = '"' if quoted and not is_folder else ""
        text = f'"{path}{closing}' if quoted else path
        yield Choice(text, len(typed), shown=f"{name}{'/' if is_folder else ''}")


def _names(start: str, commands: Commands) -> Iterator[Choice]:
    for name, command in commands.items():
        words = (name, *command.aliases)
        # A command is offered once, by its own name where that will do.
        word = next((word for word in words if word.startswith(start)), None)
        if word is not None:
            text = f"{word} " if command.arguments else word
            yield Choice(text, len(start), command.help, f"/{word} {command.arguments}".rstrip())


def _command(word: str, commands: Commands) -> Command | None:
    if word in commands:
        return commands[word]
    return next((command for command in commands.values() if word in command.aliases), None)


def _arguments(command: Command, typed: str, chat: Chat) -> Iterator[Choice]:
    last = re.split(r"\s", typed)[-1]
    for word in command.complete(chat, typed):
        # A name may have spaces: then what is typed of it is more than its last word.
        begun = next((text for text in (typed, last) if word.startswith(text)), None)
        if begun is not None:
            yield Choice(word, len(begun))
    if command.files:
        quote = typed.rfind('"') if typed.count('"') % 2 else -1
        yield from files(typed[quote:] if quote >= 0 else last)


def _entries(folder: str, start: str) -> list[tuple[str, bool]]:
    """Names that begin with `start`, folders first; hidden ones only if asked for."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(start) and (start or not name.startswith(".")) and name.isprintable():
                    found.append((name, _is_folder(entry)))
                if len(found) == _MOST:
                    break
    except (OSError, ValueError):
        # No such folder, or a name with a NUL or half a character, which a paste may hold.
        return []
    return sorted(found, key=lambda each: (not each[1], each[0]))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
