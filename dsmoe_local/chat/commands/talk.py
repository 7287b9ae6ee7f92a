"""Commands that change what was said: again, back, otherwise, on."""

from __future__ import annotations

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat import words
from dsmoe_local.chat.commands.declare import Chat, Command, Commands, read_count
from dsmoe_local.chat.frames import preview
from dsmoe_local.chat.turns import Role


def _exit(chat: Chat, _: str) -> None:
    chat.finished = True


def _clear(chat: Chat, _: str) -> None:
    before = chat.session.name if chat.session is not None else ""
    chat.adopt(None)
    kept = f"; the one before is kept: /load {safe_line(before, 60)}" if before else ""
    chat.screen.notice(f"a new conversation{kept}")


def _regenerate(chat: Chat, _: str) -> None:
    chat.show_reply(lambda conversation: conversation.regenerate())


def _continue(chat: Chat, _: str) -> None:
    turns = chat.conversation.turns
    # A message that has no reply yet is nothing to go on with, but for a model that completes it.
    cut = turns and (turns[-1].role is Role.ASSISTANT or chat.conversation.completes)
    chat.show_reply(lambda conversation: conversation.go_on(), turns[-1].content if cut else "")


def _undo(chat: Chat, argument: str) -> None:
    gone = chat.conversation.undo(_n_messages("undo", argument))
    questions = [turn for turn in gone if turn.role is Role.USER]
    if not questions:
        chat.screen.notice("there is nothing to undo")
        return
    chat.save()
    n_messages = len(questions)
    what, back = f"the last {n_messages} messages and their replies", f"/redo {n_messages} brings them back"
    if n_messages == 1:
        what, back = f"“{preview(questions[0].content, 60)}” and what was answered", "/redo brings it back"
    chat.screen.notice(f"taken back: {what}; {back}")


def _redo(chat: Chat, argument: str) -> None:
    back = chat.conversation.redo(_n_messages("redo", argument))
    questions = [turn for turn in back if turn.role is Role.USER]
    if not questions:
        chat.screen.notice("there is nothing to bring back: /redo undoes /undo, until something else is said")
        return
    chat.save()
    n_more = sum(turn.role is Role.USER for turn in chat.conversation.transcript.undone)
    more = f"; {words.count(n_more, 'more message')} can be: /redo {n_more}" if n_more else ""
    if len(questions) == 1:
        what = f"“{preview(questions[0].content, 60)}” and what was answered"
    else:
        what = f"{len(questions)} messages and their replies"
    chat.screen.notice(f"back again: {what}{more}")


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
        chat.screen.notice("the message is as it was: /regen answers it again")
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
                "the model has no chat template: it takes no system text",
                remedy="write it into the text that is to be completed",
            )
        chat.conversation.set_system("" if text in ("off", "none") else text)
        chat.save()
    system = chat.conversation.system
    chat.screen.notice(f"system: {safe_line(system, 300)}" if system else "no system text")
    if text:
        chat.advise()


COMMANDS: Commands = {
    "exit": Command(_exit, "leave", aliases=("quit", "bye")),
    "clear": Command(_clear, "begin a new conversation", aliases=("new",)),
    "regen": Command(_regenerate, "answer the last message again", aliases=("retry",)),
    "edit": Command(_edit, "change the last message, in $EDITOR or to TEXT, and answer it", "[TEXT]"),
    "editor": Command(_editor, "write a message in $EDITOR, beginning with TEXT", "[TEXT]"),
    "continue": Command(_continue, "go on with a reply that was cut or stopped"),
    "undo": Command(_undo, "take back the last N messages and their replies", "[N]"),
    "redo": Command(_redo, "bring back the next N messages that /undo took", "[N]"),
    "system": Command(_system, "show or change the system text; off removes it", "[TEXT]"),
}
