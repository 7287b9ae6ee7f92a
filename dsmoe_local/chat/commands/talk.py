"""Commands that change the conversation: /regen, /edit, /continue, /undo, /redo, /clear, /system."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.chat.attachments import preview
from dsmoe_local.chat.commands.declare import Chat, Command, Commands, read_count
from dsmoe_local.chat.turns import Role, Turn


def _exit(chat: Chat, _: str) -> None:
    chat.finished = True


def _clear(chat: Chat, _: str) -> None:
    before = chat.session.name if chat.session is not None else ""
    chat.adopt(None)
    system = " with the same system text (/system off removes it)" if chat.conversation.system else ""
    stored = f"; the previous one is stored: /load {safe_line(before, 60)}" if before else ""
    chat.screen.notice(f"a new conversation{system}{stored}")


def _regenerate(chat: Chat, _: str) -> None:
    chat.show_reply(lambda conversation: conversation.regenerate())


def _continue(chat: Chat, _: str) -> None:
    turns = chat.conversation.turns
    # An unanswered message is continued only by a base model; a chat model answers it.
    cut = turns and (turns[-1].role is Role.ASSISTANT or chat.conversation.completes)
    chat.show_reply(lambda conversation: conversation.continue_reply(), turns[-1].content if cut else "")


def _undo(chat: Chat, argument: str) -> None:
    removed = chat.conversation.undo(_n_messages("undo", argument))
    if not removed:
        chat.screen.notice("there is nothing to undo")
        return
    chat.save()
    n_messages, what = _described(removed)
    restore = "/redo restores it" if n_messages == 1 else f"/redo {n_messages} restores them"
    chat.screen.notice(f"removed: {what}; {restore}")


def _redo(chat: Chat, argument: str) -> None:
    restored = chat.conversation.redo(_n_messages("redo", argument))
    if not restored:
        chat.screen.notice("there is nothing to redo: a new message or reply discards what /undo removed")
        return
    chat.save()
    n_more = sum(turn.role is Role.USER for turn in chat.conversation.transcript.undone)
    more = f"; /redo {n_more} restores {count(n_more, 'more message')}" if n_more else ""
    chat.screen.notice(f"restored: {_described(restored)[1]}{more}")


def _described(turns: Sequence[Turn]) -> tuple[int, str]:
    """Return the number of messages in `turns`, and what to call them with their replies."""
    messages = [turn for turn in turns if turn.role is Role.USER]
    if len(messages) == 1:
        return 1, f"“{preview(messages[0].content, 60)}” and its reply"
    return len(messages), f"{len(messages)} messages and their replies"


def _n_messages(command: str, argument: str) -> int:
    n_messages = read_count(argument or "1")
    if not n_messages:
        raise UsageError(f"/{command} takes a number of messages, not {safe_line(argument, 40)!r}")
    return n_messages


def _edit(chat: Chat, argument: str) -> None:
    question = chat.conversation.last(Role.USER)
    if question is None:
        raise UsageError("there is no message to edit yet")
    text = argument or chat.screen.edit(question.content)
    if text is None or not text.strip() or text == question.content:
        chat.screen.notice("the message was not changed: /regen answers it again")
        return
    if not argument:
        chat.screen.echo(text)
    chat.show_reply(lambda conversation: conversation.edit(text))


def _editor(chat: Chat, text: str) -> None:
    message = chat.screen.edit(text)
    if message is None or not message.strip():
        chat.screen.notice("nothing was written")
        return
    chat.screen.echo(message)
    chat.send(message)


def _system(chat: Chat, text: str) -> None:
    if text:
        if chat.conversation.completes:
            raise UsageError(
                "the model has no chat template, and so no system text",
                remedy="write it into the text to be completed",
            )
        chat.conversation.set_system("" if text in ("off", "none") else text)
        chat.save()
    system = chat.conversation.system
    chat.screen.notice(f"system: {safe_line(system, 300)}" if system else "no system text")
    if text:
        chat.advise()


COMMANDS: Commands = {
    "exit": Command(_exit, "leave", aliases=("quit", "bye")),
    "clear": Command(_clear, "begin a new conversation; the system text stays", aliases=("new",)),
    "regen": Command(_regenerate, "answer the last message again", aliases=("retry",)),
    "edit": Command(_edit, "change the last message, in $EDITOR or to TEXT, and answer it", "[TEXT]"),
    "editor": Command(_editor, "write a message in $EDITOR, beginning with TEXT", "[TEXT]"),
    "continue": Command(_continue, "continue a reply that was cut or stopped"),
    "undo": Command(_undo, "remove the last N messages and their replies", "[N]"),
    "redo": Command(_redo, "restore N messages that /undo removed", "[N]"),
    "system": Command(_system, "show or change the system text; off removes it", "[TEXT]"),
}
