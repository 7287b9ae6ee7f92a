"""The slash commands: one declaration each gives behaviour, help and completion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.screen import Screen, describe_usage
from dsmoe_local.chat.settings import SETTINGS, change, get_setting, setting_name
from dsmoe_local.engine.types import TokenEvent


class Chat(Protocol):
    """What commands act on; the REPL has it."""

    conversation: Conversation
    screen: Screen
    finished: bool

    def show_reply(self, action: Callable[[Conversation], Iterable[TokenEvent]]) -> None:
        """Print the reply whose events `action` returns."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command. `run` gets the chat and what follows the name."""

    run: Callable[[Chat, str], None]
    help: str
    arguments: str = ""
    aliases: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def _help(chat: Chat, _: str) -> None:
    rows = [
        (
            " ".join(f"/{word}" for word in (name, *command.aliases)) + f" {command.arguments}".rstrip(),
            command.help,
        )
        for name, command in COMMANDS.items()
    ]
    keys = [
        ("Enter", 'sends; Alt-Enter or Ctrl-J begins a new line; """ opens and closes a block'),
        ("Ctrl-C", "stops a reply, which stays, or clears the line"),
        ("Ctrl-D", "leaves"),
        ("Ctrl-R", "searches what you typed before; Ctrl-X Ctrl-E opens $EDITOR"),
    ]
    chat.screen.table([*rows, ("", ""), *keys])


def _exit(chat: Chat, _: str) -> None:
    chat.finished = True


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    chat.screen.notice("a new conversation")


def _regenerate(chat: Chat, _: str) -> None:
    chat.show_reply(lambda conversation: conversation.regenerate())


def _continue(chat: Chat, _: str) -> None:
    chat.show_reply(lambda conversation: conversation.go_on())


def _undo(chat: Chat, _: str) -> None:
    undone = chat.conversation.undo()
    chat.screen.notice(
        "the last message and its reply are forgotten" if undone else "there is nothing to undo"
    )


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.conversation.system = "" if text in ("off", "none") else text
    system = chat.conversation.system
    chat.screen.notice(f"system: {system}" if system else "no system text")


def _set(chat: Chat, text: str) -> None:
    word, _, value = text.partition(" ")
    settings = chat.conversation.settings
    if not word:
        chat.screen.table(
            [(name, _shown(get_setting(settings, name)), setting.help) for name, setting in SETTINGS.items()]
        )
        return
    name = setting_name(word)
    if value.strip():
        chat.conversation.settings = settings = change(settings, name, value)
    chat.screen.notice(f"{name} = {_shown(get_setting(settings, name))}")


def _shown(value: object) -> str:
    return "none" if value is None or value == () else str(value)


def _stats(chat: Chat, _: str) -> None:
    conversation = chat.conversation
    if conversation.usage is not None:
        chat.screen.notice(describe_usage(conversation.usage))
    chat.screen.notice(f"context: {conversation.n_used} of {conversation.engine.info.n_context} tokens")


def _show(chat: Chat, _: str) -> None:
    info = chat.conversation.engine.info
    experts = (
        f"{info.n_experts_per_token} of {info.n_routed_experts}" if info.n_routed_experts else "none: dense"
    )
    chat.screen.table(
        [
            ("model", info.name),
            ("file", str(info.path)),
            ("parameters", f"{info.n_parameters:,}"),
            ("routed experts", experts),
            ("context", f"{info.n_context} tokens (trained for {info.n_context_trained})"),
            ("template", info.template or "none: it completes text"),
            ("threads", str(info.n_threads)),
        ]
    )


COMMANDS: Mapping[str, Command] = {
    "help": Command(_help, "this list", aliases=("?",)),
    "exit": Command(_exit, "leave", aliases=("quit", "bye")),
    "clear": Command(_clear, "begin a new conversation"),
    "regen": Command(_regenerate, "answer the last message again"),
    "continue": Command(_continue, "go on with a reply that was cut or stopped"),
    "undo": Command(_undo, "forget the last message and its reply"),
    "system": Command(_system, "show or change the system text; off removes it", "[TEXT]"),
    "set": Command(_set, "show or change how replies are made", "[NAME [VALUE]]", words=tuple(SETTINGS)),
    "show": Command(_show, "what the model is"),
    "stats": Command(_stats, "what the last reply took, and how full the context is"),
}
BY_WORD: Mapping[str, Command] = {
    word: command for name, command in COMMANDS.items() for word in (name, *command.aliases)
}
_FIRST_WORD = re.compile(r"/(\S+)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Unknown:
    """A word that is no command but close to one."""

    word: str
    nearest: str


def parse(text: str) -> tuple[Command, str] | Unknown | None:
    """The command in `text` and its argument; Unknown with the nearest; None: it is a message.

    Only known names are commands: `/usr/bin is …` is a message.
    """
    match = _FIRST_WORD.fullmatch(text.strip())
    if match is None:
        return None
    word, argument = match[1], (match[2] or "").strip()
    if word in BY_WORD:
        return BY_WORD[word], argument
    near = difflib.get_close_matches(word.lower(), BY_WORD, n=1, cutoff=0.7)
    return Unknown(word, near[0]) if near else None
