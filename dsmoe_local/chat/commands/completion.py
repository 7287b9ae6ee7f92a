"""Completion of the chat's input: slash commands, their arguments, and names of files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.terminal.screen import Choice

_MAX_ENTRIES = 200
_MENTION = re.compile(r'(?:^|(?<=\s))@("[^"\n]*|[^\s"]*)$')


def choices(before: str, commands: Commands, chat: Chat) -> Iterator[Choice]:
    """Yield the completions of `before`, the input up to the cursor."""
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
    """Yield files and folders whose path begins with `typed`; after an opening quote it may have spaces."""
    word = typed.removeprefix('"')
    head, _, start = word.rpartition("/")
    # Not Path.expanduser, which raises an error for `~nobody`.
    folder = os.path.expanduser(f"{head}/" if "/" in word else ".")
    for name, is_folder in _entries(folder, start):
        path = f"{word[: len(word) - len(start)]}{name}{'/' if is_folder else ''}"
        quoted = " " in path or typed.startswith('"')
        closing = '"' if quoted and not is_folder else ""
        text = f'"{path}{closing}' if quoted else path
        yield Choice(text, len(typed), shown=f"{name}{'/' if is_folder else ''}")


def _names(start: str, commands: Commands) -> Iterator[Choice]:
    for name, command in commands.items():
        # Each command once: by its own name if that fits, otherwise by an alias.
        word = next((word for word in (name, *command.aliases) if word.startswith(start)), None)
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
        # The word may have spaces; then more than the last word of `typed` belongs to it.
        begun = next((text for text in (typed, last) if word.startswith(text)), None)
        if begun is not None:
            yield Choice(word, len(begun))
    if command.files:
        quote = typed.rfind('"') if typed.count('"') % 2 else -1
        yield from files(typed[quote:] if quote >= 0 else last)


def _entries(folder: str, start: str) -> list[tuple[str, bool]]:
    """Return the names that begin with `start`, and whether they are folders; folders first.

    Hidden names only if `start` begins with a dot.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(start) and (start or not name.startswith(".")) and name.isprintable():
                    found.append((name, _is_folder(entry)))
                if len(found) == _MAX_ENTRIES:
                    break
    except (OSError, ValueError):
        # There is no such folder, or a pasted name holds a NUL or a surrogate.
        return []
    return sorted(found, key=lambda each: (not each[1], each[0]))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
