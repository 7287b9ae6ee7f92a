"""Commands for stored sessions: list, name, open, fork, search and delete them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.turns import Role

if TYPE_CHECKING:
    from dsmoe_local.chat.store.sessions import Session, SessionStore

_SHOWN = 30
_ARROW = "->"
_WHO = {Role.USER: "you", Role.ASSISTANT: "reply"}


def _store(chat: Chat) -> SessionStore:
    if chat.sessions is None:
        raise UsageError("this chat is not stored", remedy="start it without --no-history")
    return chat.sessions


def _is_current(chat: Chat, session: Session) -> bool:
    return chat.session is not None and chat.session.number == session.number


def _save(chat: Chat, name: str) -> None:
    store = _store(chat)
    if name:
        store.rename(chat.current_session(store), name)
    chat.save()
    session = chat.session
    if session is not None and session.number:
        chat.screen.notice(f"this session is {session.name}, and is always saved")
    else:
        called = f" as {session.name}" if session is not None and session.name else ""
        chat.screen.notice(f"this session is saved{called} from its first message on")


def _load(chat: Chat, name: str) -> None:
    session = _store(chat).find(name)
    if _is_current(chat, session):
        chat.screen.notice(f"{session.name} is the current session")
        return
    chat.save()
    chat.adopt(session)
    chat.recall()


def _sessions(chat: Chat, argument: str) -> None:
    store = _store(chat)
    if argument not in ("", "all"):
        raise UsageError(
            f"/sessions does not take {safe_line(argument, 40)!r}", remedy="/sessions all lists all of them"
        )
    summaries = store.summaries()
    if not summaries:
        chat.screen.notice("no sessions yet")
        return
    shown = summaries if argument else summaries[:_SHOWN]
    current = chat.session.number if chat.session is not None else 0
    chat.screen.table(
        (
            f"{'*' if summary.number == current else ' '}{summary.number}",
            summary.name,
            summary.title,
            f"{count(summary.n_turns, 'message')}, {summary.model}, {_when(summary.updated)}",
        )
        for summary in shown
    )
    if len(shown) < len(summaries):
        chat.screen.notice(f"and {len(summaries) - len(shown):,} older ones: /sessions all")


def _rename(chat: Chat, argument: str) -> None:
    store = _store(chat)
    # Names may have spaces: only an arrow separates them.
    old, arrow, new = argument.partition(_ARROW)
    session, name = (store.find(old.strip()), new) if arrow else (chat.current_session(store), argument)
    before = session.name
    store.rename(session, name)
    chat.screen.notice(f"{before} is now {session.name}" if before else f"this session is now {session.name}")


def _delete(chat: Chat, name: str) -> None:
    store = _store(chat)
    session = store.find(name)
    summary = store.summary(session)
    if summary is None:
        raise UsageError(
            f"{session.name} was deleted by another program", remedy="/sessions lists the others"
        )
    question = f"Delete {session.name} ({count(summary.n_turns, 'message')}: “{summary.title}”) permanently?"
    if not chat.screen.confirm(question):
        chat.screen.notice("nothing was deleted")
        return
    was_current = _is_current(chat, session)
    store.delete(session)
    if was_current:
        # `adopt` saves the current session, which must not come back.
        chat.session = None
        chat.conversation.clear()
        chat.adopt(None)
    chat.screen.notice(f"{session.name} is deleted{': a new conversation' if was_current else ''}")


def _search(chat: Chat, wanted: str) -> None:
    store = _store(chat)
    if not wanted:
        raise UsageError(
            "the words to search for are missing", remedy="/search WORDS finds messages with all of them"
        )
    hits = store.search(wanted)
    if not hits:
        chat.screen.notice("nothing found")
        return
    chat.screen.table(
        (hit.session, f"{_WHO[hit.role]}: {hit.snippet}", f"message {hit.turn}, {_when(hit.when)}")
        for hit in hits
    )


def _fork(chat: Chat, name: str) -> None:
    store = _store(chat)
    chat.save()
    if chat.session is None:
        raise UsageError("there is nothing to fork yet")
    before = chat.session.name
    fork = store.fork(chat.session, name)
    chat.adopt(fork)
    chat.screen.notice(f"this is now {fork.name}; {before} is unchanged: /load {before} opens it")


def _names(chat: Chat, typed: str) -> Iterator[str]:
    """Complete the last word of a session's name."""
    if chat.sessions is None:
        return
    try:
        names = chat.sessions.names()
    except DsmoeError:
        # Not reported while the user types: the command itself will fail.
        return
    before = len(typed) - len(typed.rpartition(" ")[2])
    folded = typed.casefold()
    yield from (name[before:] for name in names if name.casefold().startswith(folded))


def _names_and_arrow(chat: Chat, typed: str) -> Iterator[str]:
    if _ARROW in typed:
        return
    yield from _names(chat, typed)
    if typed.endswith(" ") and typed.rstrip() in _names(chat, ""):
        yield _ARROW


def _all(chat: Chat, typed: str) -> Iterable[str]:
    return ["all"]


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


COMMANDS: Commands = {
    "sessions": Command(_sessions, "list the stored sessions", "[all]", complete=_all),
    "save": Command(_save, "name this session; it is always saved", "[NAME]"),
    "load": Command(
        _load, "open another session by its name, number, or beginning of its name", "NAME", complete=_names
    ),
    "rename": Command(
        _rename,
        "rename this session, or the session OLD",
        f"[OLD {_ARROW}] NEW",
        complete=_names_and_arrow,
    ),
    "delete": Command(_delete, "delete a session permanently, after asking", "NAME", complete=_names),
    "fork": Command(_fork, "continue in a copy of this session", "[NAME]"),
    "search": Command(_search, "find past messages and replies with all these words", "WORDS"),
}
