"""The table of all slash commands, and the parser that recognizes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.commands import experts, files, look, model, sessions, settings, talk
from dsmoe_local.chat.commands.declare import Chat, Command, Commands

KEYS = (
    ("Enter", 'sends; Alt-Enter or Ctrl-J begins a new line; """ opens and closes a block'),
    (
        "Ctrl-C",
        "stops a reply and keeps its text; again: ends an engine that hangs; otherwise clears the line",
    ),
    ("Ctrl-D", "leaves"),
    ("Ctrl-R", "searches earlier inputs; Ctrl-G opens $EDITOR"),
    ("Tab", "completes commands, their arguments, and files after @"),
)


def _help(chat: Chat, word: str) -> None:
    if not word:
        # All commands with their explanations would scroll out of most windows.
        names = [(title, " ".join(f"/{name}" for name in group)) for title, group in GROUPS.items()]
        chat.screen.table([*names, ("", ""), ("Keys", ""), *KEYS])
        chat.screen.notice("/help COMMAND explains a command, /help all explains all of them")
        return
    if word == "all":
        rows: list[tuple[str, str]] = []
        for title, group in GROUPS.items():
            rows += [("", ""), (title, ""), *(_row(name, command) for name, command in group.items())]
        chat.screen.table(rows[1:])
        return
    command = BY_WORD.get(word.removeprefix("/"))
    if command is None:
        raise UsageError(f"there is no command {safe_line(word, 40)!r}", remedy="/help lists them")
    name = next(name for name, entry in COMMANDS.items() if entry is command)
    chat.screen.table([_row(name, command)])


def _row(name: str, command: Command) -> tuple[str, str]:
    names = " ".join(f"/{word}" for word in (name, *command.aliases))
    return f"{names} {command.arguments}".rstrip(), command.help


GROUPS: Mapping[str, Commands] = {
    "The conversation": {
        "help": Command(
            _help,
            "list the commands and keys, explain one command, or all",
            "[COMMAND|all]",
            aliases=("?",),
            complete=lambda chat, typed: ["all", *COMMANDS],
        ),
        **talk.COMMANDS,
    },
    "Sessions": sessions.COMMANDS,
    "Files": files.COMMANDS,
    "Settings": {**model.COMMANDS, **settings.COMMANDS},
    "Looking inside": {**look.COMMANDS, **experts.COMMANDS},
}
COMMANDS: Commands = {name: command for group in GROUPS.values() for name, command in group.items()}
BY_WORD: Commands = {word: command for name, command in COMMANDS.items() for word in (name, *command.aliases)}
_FIRST_WORD = re.compile(r"/(\S+)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Unknown:
    """An unknown command. `nearest` is the most similar one."""

    word: str
    nearest: str


def parse(text: str) -> tuple[Command, str] | Unknown | None:
    """Return the command in `text` with its argument, Unknown for a misspelled one, or None for a message.

    `/usr/bin is …` is a message.
    """
    match = _FIRST_WORD.fullmatch(text.strip())
    if match is None:
        return None
    word, argument = match[1].casefold(), (match[2] or "").strip()
    if word in BY_WORD:
        return BY_WORD[word], argument
    if "/" in word:
        return None
    near = difflib.get_close_matches(word, BY_WORD, n=1, cutoff=0.7)
    if near:
        return Unknown(match[1], near[0])
    # A single word is more likely meant as a command than as a message.
    return Unknown(match[1], "help") if re.fullmatch(r"[a-z]+", word) and not argument else None
