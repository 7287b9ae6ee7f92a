"""Commands for files and the clipboard: /read, /export, /copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.base.text_files import write_text_file
from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.export import export_as
from dsmoe_local.chat.export.formats import About, export_markdown, title_of
from dsmoe_local.chat.turns import Role

PICTURE, NUMBERS = "experts.svg", "experts.json"


def about(chat: Chat) -> About:
    """Return the metadata for an export of this chat."""
    transcript, info = chat.conversation.transcript, chat.conversation.engine.info
    title = (chat.session.name if chat.session is not None else "") or title_of(transcript)
    return About(title, info.name, datetime.now().astimezone(), info.vocabulary)


def _export(chat: Chat, argument: str) -> None:
    name = _unquoted(argument)
    if not name:
        raise UsageError(
            "the name of a file is missing", remedy=f"/export chat.html, .md or .json, or {PICTURE}"
        )
    # Path.expanduser raises for `~nobody`.
    path = Path(os.path.expanduser(name))
    if _is_picture(path):
        if _may_write(chat, path):
            chat.experts.export(path)
            chat.screen.notice(f"written: {path}")
        return
    transcript = chat.conversation.transcript
    if not transcript.turns:
        raise UsageError("there is nothing to export yet")
    content = export_as(path.name, transcript, about(chat))
    if _may_write(chat, path):
        write_text_file(path, content, "the export")
        chat.screen.notice(f"written: {path}, {count(len(transcript.turns), 'message')}")


def _is_picture(path: Path) -> bool:
    # Any other .json file is for the conversation.
    return path.suffix.lower() == ".svg" or path.name.lower() == NUMBERS


def _may_write(chat: Chat, path: Path) -> bool:
    # Path.exists raises for names that are too long.
    if not os.path.exists(path) or chat.screen.confirm(f"{safe_line(str(path))} exists already. Replace it?"):
        return True
    chat.screen.notice("nothing was written")
    return False


def _copy(chat: Chat, argument: str) -> None:
    what = argument.lower()
    if what not in _COPIED:
        raise UsageError(
            f"/copy does not take {safe_line(argument, 40)!r}", remedy="use /copy, /copy code or /copy all"
        )
    text = _COPIED[what](chat)
    way = chat.screen.copy(text)
    chat.screen.notice(f"copied {count(len(text), 'character')}: {way}")


def _last_reply(chat: Chat) -> str:
    return next(_replies(chat), "") or _nothing("there is no reply to copy yet")


def _last_code(chat: Chat) -> str:
    """Return the last code block without its last newline, which a shell would execute."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark")
    for reply in _replies(chat):
        blocks = (block for block in reversed(markdown.parse(reply)) if block.type in ("fence", "code_block"))
        code = next((block.content for block in blocks if block.content.strip()), "")
        if code:
            return code.removesuffix("\n")
    return _nothing("there is no code to copy yet")


def _all(chat: Chat) -> str:
    transcript = chat.conversation.transcript
    return (
        export_markdown(transcript, about(chat))
        if transcript.turns
        else _nothing("there is nothing to copy yet")
    )


def _replies(chat: Chat) -> Iterator[str]:
    turns = chat.conversation.transcript.turns
    return (turn.content.strip() for turn in reversed(turns) if turn.role is Role.ASSISTANT)


def _nothing(why: str) -> str:
    raise UsageError(why)


_COPIED: Mapping[str, Callable[[Chat], str]] = {"": _last_reply, "code": _last_code, "all": _all}


def _read(chat: Chat, argument: str) -> None:
    from dsmoe_local.chat.attachments import describe, expand, read_attachment, split_name

    name, question = split_name(argument)
    attachment, asked = read_attachment(name), expand(question)
    for file in (attachment, *asked.files):
        chat.screen.notice(describe(file))
    # A base model continues the text, so it gets no frame.
    content = attachment.text if chat.conversation.completes else attachment.framed
    message = f"{content.rstrip()}\n\n{asked.text}" if asked.text else content
    chat.show_reply(lambda conversation: conversation.send(message))


def _unquoted(argument: str) -> str:
    if len(argument) > 1 and argument[0] == argument[-1] == '"':
        return argument[1:-1]
    return argument


def _words_to_copy(chat: Chat, typed: str) -> Iterable[str]:
    return [word for word in _COPIED if word]


def _pictures(chat: Chat, typed: str) -> Iterable[str]:
    return [PICTURE]


COMMANDS: Commands = {
    "read": Command(
        _read,
        "send a text file, with a question about it; @FILE in a message does the same",
        "FILE [QUESTION]",
        files=True,
    ),
    "export": Command(
        _export,
        f"write the conversation to a .md, .json or .html file, or the experts to {PICTURE}",
        "FILE",
        complete=_pictures,
        files=True,
    ),
    "copy": Command(
        _copy,
        "copy the last reply, its code, or everything to the clipboard",
        "[code|all]",
        complete=_words_to_copy,
    ),
}
