"""Stored conversations for tests: turns in short, and a plain-Python model of what the store must hold."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason, Usage

Path: TypeAlias = tuple[tuple[int, Turn], ...]
"""Turns with the number of each in the model."""


def said(text: str) -> Turn:
    """A message."""
    return Turn(Role.USER, text)


def replied(text: str, token_ids: Iterable[int] = (1, 2, 3)) -> Turn:
    """A reply, every other one with reasoning."""
    reasoning = f"about {text}" if len(text) % 2 else ""
    usage = Usage(12, 3, 4, 0.25, 0.5, 7, len(reasoning))
    return Turn(Role.ASSISTANT, text, tuple(token_ids), FinishReason.STOP, usage, reasoning)


def talk(*texts: str, system: str = "") -> Transcript:
    """A conversation whose turns take turns."""
    return Transcript(
        tuple((replied if place % 2 else said)(text) for place, text in enumerate(texts)), system
    )


@dataclass
class StoredSession:
    """What the model knows of a session."""

    number: int
    name: str
    path: Path
    revision: int
    transcript: Transcript
    draft: Turn | None = None
    undone: Path = ()

    @property
    def whole(self) -> Transcript:
        """What a chat that loads it gets: with the reply that was not finished."""
        turns = self.transcript.turns
        return replace(self.transcript, turns=turns if self.draft is None else (*turns, self.draft))


@dataclass
class OpenSession:
    """A chat's view: what it last read or wrote."""

    number: int = 0
    name: str = ""
    path: Path = ()
    revision: int = 0
    transcript: Transcript = field(default_factory=Transcript)
    draft: Turn | None = None
    undone: Path = ()


@dataclass
class StoreModel:
    """Sessions and the turns that exist, with plain dictionaries. The rules are said once more."""

    sessions: dict[int, StoredSession] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # session numbers, the one saved last in the end
    writers: dict[int, int] = field(default_factory=dict)  # turn -> session, of the turns that exist
    parents: dict[int, int | None] = field(default_factory=dict)
    trees: dict[int, int] = field(default_factory=dict)  # session -> tree
    turn_trees: dict[int, int] = field(default_factory=dict)
    n_numbers: int = 0
    n_turns: int = 0

    def save(self, chat: OpenSession, transcript: Transcript, *, partial: bool = False) -> bool:
        """True if the chat became a new session although it was one already. `partial`: the last turn is no
        turn yet.
        """
        draft = None
        if partial:
            draft = transcript.turns[-1]
            transcript = replace(transcript, turns=transcript.turns[:-1], undone=())
        wanted = (*transcript.turns, *transcript.undone)
        known = (*chat.path, *chat.undone)
        turns = tuple(turn for _, turn in known)
        if chat.number == 0 and not transcript.turns and draft is None:
            return False
        stored = self.sessions.get(chat.number)
        if chat.number and (chat.transcript, chat.draft) == (transcript, draft):
            return False
        pairs = zip(turns, wanted, strict=False)
        n_common = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
        path = known[:n_common]
        if path and path[-1][0] not in self.writers:
            path = ()
        was_stored, conflict = chat.number != 0, False
        if stored is None or stored.revision != chat.revision:
            conflict = was_stored
            tree = self.turn_trees[path[-1][0]] if path else None
            chat.name = self._new_session(chat, stored.name if stored else chat.name, tree)
            chat.number = self.n_numbers
        else:
            chat.name = stored.name
        for turn in wanted[len(path) :]:
            self.n_turns += 1
            self.parents[self.n_turns] = path[-1][0] if path else None
            self.writers[self.n_turns] = chat.number
            self.turn_trees[self.n_turns] = self.trees[chat.number]
            path = (*path, (self.n_turns, turn))
        session = self.sessions[chat.number]
        n_turns = len(transcript.turns)
        session.path, session.undone = path[:n_turns], path[n_turns:]
        session.transcript, session.draft = transcript, draft
        session.revision += 1
        self._touch(chat.number)
        self.remember(chat, session)
        return conflict

    def remember(self, chat: OpenSession, session: StoredSession) -> None:
        """The chat has read or written the session."""
        chat.number, chat.name = session.number, session.name
        chat.path, chat.revision, chat.transcript = session.path, session.revision, session.transcript
        chat.draft, chat.undone = session.draft, session.undone

    def fork(self, chat: OpenSession, fork: OpenSession, name: str = "") -> None:
        """A new session of the chat's turns."""
        fork.name, fork.path, fork.undone = name or chat.name, chat.path, chat.undone
        turns = chat.transcript.turns if chat.draft is None else (*chat.transcript.turns, chat.draft)
        self.save(fork, replace(chat.transcript, turns=turns))

    def delete(self, number: int) -> None:
        """The session goes, and with it all turns that nothing which is left needs."""
        tree = self.trees.pop(number)
        del self.sessions[number]
        self.order.remove(number)
        needed: set[int] = set()
        for session in self.sessions.values():
            if self.trees[session.number] == tree:
                needed |= {turn for turn, _ in (*session.path, *session.undone)}
        for turn, writer in self.writers.items():
            if writer in self.sessions and self.turn_trees[turn] == tree:
                parent: int | None = turn
                while parent is not None:
                    needed.add(parent)
                    parent = self.parents[parent]
        for turn in [turn for turn in self.writers if self.turn_trees[turn] == tree and turn not in needed]:
            del self.writers[turn]

    def rename(self, number: int, name: str) -> None:
        """Another name."""
        self.sessions[number].name = name

    def is_taken(self, name: str) -> bool:
        """Whether a session has that name, in whatever case."""
        return any(session.name.casefold() == name.casefold() for session in self.sessions.values())

    def found(self, words: list[str]) -> list[str]:
        """The contents of all turns shown by a session that hold all words, in order of their text."""
        shown = {turn: content for session in self.sessions.values() for turn, content in session.path}
        return sorted(turn.content for turn in shown.values() if all(holds(turn.content, w) for w in words))

    def _new_session(self, chat: OpenSession, wanted: str, tree: int | None) -> str:
        self.n_numbers += 1
        name = self.free_name(wanted or f"chat-{self.n_numbers}")
        self.sessions[self.n_numbers] = StoredSession(self.n_numbers, name, (), 0, Transcript())
        self.trees[self.n_numbers] = tree or self.n_numbers
        self.order.append(self.n_numbers)
        return name

    def free_name(self, wanted: str) -> str:
        """The name, or the first that is free of the name with a number."""
        if not self.is_taken(wanted):
            return wanted
        stem = re.sub(r" \d+$", "", wanted)
        return next(f"{stem} {n}" for n in itertools.count(2) if not self.is_taken(f"{stem} {n}"))

    def _touch(self, number: int) -> None:
        self.order.remove(number)
        self.order.append(number)


def plain(text: str) -> str:
    """Without case and accents."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(part for part in parts if not unicodedata.combining(part))


def holds(text: str, word: str) -> bool:
    """Whether a text of words and Chinese characters holds a word: Chinese anywhere, else as a beginning."""
    text, word = plain(text), plain(word)
    if any(letter > "\u3000" for letter in word):
        return word in "".join(text.split())
    return any(part.startswith(word) for part in re.findall("[a-z0-9]+", text))


def without_ids(transcript: Transcript) -> Transcript:
    """As another vocabulary sees it."""
    turns, undone = (
        tuple(replace(turn, token_ids=()) for turn in part) for part in (transcript.turns, transcript.undone)
    )
    return replace(transcript, turns=turns, undone=undone)
