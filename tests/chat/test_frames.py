"""Files in front of messages: framed, and told apart from what a person typed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.chat.attachments import framed, without_files
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.export.formats import title_of
from dsmoe_local.chat.notices import made_room
from dsmoe_local.chat.turns import Role, Transcript, Turn

NAMES = st.sampled_from(["notes.txt", "a b.py", "x", "~/é.md", 'q".c++'])
TEXTS = st.lists(st.sampled_from(["```", "````", "\n", "\n\n", "a.py:\n", "word", " "])).map("".join)


@given(st.lists(st.tuples(NAMES, TEXTS), min_size=1, max_size=3), st.sampled_from(["", "why?", "a\n\nb"]))
def test_what_was_typed_is_found_again(files: list[tuple[str, str]], typed: str) -> None:
    """Guards: a preview that shows the file, or takes a fence in it for its end."""
    frames = [framed(name, text) for name, text in files]
    expected = " ".join([*(f"[{name}]" for name, _ in files), typed]).strip()
    assert without_files("\n\n".join([*frames, typed] if typed else frames)) == expected


def test_other_messages_stay() -> None:
    """Guards: a message that only begins as a frame does, shown without its words."""
    for message in ("hello", "a.py:\n```py\nopen", "a.py:\n```\nx\n```\nmore", "```\nx\n```", "a:\n```"):
        assert without_files(message) == message


def test_titles_and_notes_tell_the_question() -> None:
    """Guards: an export called after the file, a note that tells its first line."""
    turn = Turn(Role.USER, framed("notes.txt", "secret") + "\n\nwhat is this?")
    assert title_of(Transcript((turn,))) == "[notes.txt] what is this?"
    assert "“[notes.txt] what is this?”" in made_room(MadeRoom(turns=(turn,)))
