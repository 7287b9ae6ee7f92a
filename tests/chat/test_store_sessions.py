"""The session store, case by case: what comes back, what is written, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.stored import replied, said, talk, without_ids

from dsmoe_local.base.errors import LockedError, UsageError
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.turns import Transcript
from dsmoe_local.engine.types import FinishReason


def test_everything_of_a_turn_comes_back(store: SessionStore, other: SessionStore) -> None:
    """Guards: a field that is not stored, or comes back as something else."""
    transcript = Transcript(
        (
            said("line\nnul \x00 esc \x1b[31m bom \ufeff 混合 🚀 "),
            replace(replied("half", range(5000)), ending=FinishReason.CANCELLED, usage=None),
            said(""),
            replace(replied("cut", ()), ending=FinishReason.CONTEXT_FULL),
            said("unanswered"),
        ),
        "Be brief.\n",
        n_left_out=2,
        n_shifted=17,
    )
    session = store.create("model", "v", "Be brief.\n")
    assert session.save(transcript) is None
    assert other.find(session.name).load("v") == transcript
    assert other.find(session.name).load("another") == without_ids(transcript)


def test_half_characters_are_stored_as_such(store: SessionStore) -> None:
    """Guards: a paste with half of a surrogate pair that can never be saved."""
    session = store.create("m\udc80", "v", "\ud83d")
    session.save(talk("a\ud83d b", system="\ud83d"))
    assert store.find(session.name).load("v") == talk("a\ufffd b", system="\ufffd")
    assert [hit.turn for hit in store.search("a\ud83d")] == [1]
    with pytest.raises(UsageError):
        store.find("\udcff")


def test_ids_of_another_vocabulary_are_kept_for_the_model_they_are_of(store: SessionStore) -> None:
    """Guards: token ids of one model fed to another, or lost since another has gone on."""
    session = store.create("first", "v", "")
    session.save(talk("a", "b"))
    again = store.find(session.name)
    transcript = again.load("w", "second")
    again.save(replace(transcript, turns=(*transcript.turns, *talk("c", "d").turns)))
    turns = store.find(session.name).load("v").turns
    assert [turn.token_ids for turn in turns] == [(), (1, 2, 3), (), ()]
    turns = store.find(session.name).load("w").turns
    assert [turn.token_ids for turn in turns] == [(), (), (), (1, 2, 3)]
    assert store.summaries()[0].model == "second"


def test_a_turn_more_is_a_turn_written(store: SessionStore) -> None:
    """Guards: a long session written anew with every message."""
    session = store.create("m", "v", "")
    transcript = talk(*(f"turn {number}" for number in range(2000)))
    session.save(transcript)
    statements: list[str] = []
    connection = session._database._writer
    connection.set_trace_callback(statements.append)
    n_changes = connection.total_changes
    session.save(replace(transcript, turns=(*transcript.turns, said("one more"))))
    connection.set_trace_callback(None)
    writing = [text.split("(")[0].strip() for text in statements if "main." not in text]
    assert sum(text.startswith("INSERT INTO turn") for text in writing) == 1
    assert len(writing) < 25
    assert connection.total_changes - n_changes < 20
    statements.clear()
    connection.set_trace_callback(statements.append)
    session.save(replace(transcript, turns=(*transcript.turns, said("one more"))))
    connection.set_trace_callback(None)
    assert statements == []


def test_two_chats_on_one_session_lose_nothing(store: SessionStore, other: SessionStore) -> None:
    """Guards: the one that saves last overwriting what the other said."""
    mine = store.create("m", "v", "")
    mine.save(talk("a", "b"))
    store.rename(mine, "Plans")
    theirs = other.find("plans")
    theirs.load("v")
    assert theirs.save(talk("a", "b", "theirs")) is None
    note = mine.save(talk("a", "b", "mine"))
    assert note == "another program has changed Plans: this chat is now the session Plans 2"
    assert mine.name == "Plans 2"
    assert mine.save(talk("a", "b", "mine", "d")) is None
    assert theirs.save(talk("a", "b", "theirs", "d")) is None
    assert other.find("Plans 2").load("v") == talk("a", "b", "mine", "d")
    assert store.find("Plans").load("v") == talk("a", "b", "theirs", "d")


def test_what_was_deleted_elsewhere_is_stored_again_when_the_chat_goes_on(
    store: SessionStore, other: SessionStore
) -> None:
    """Guards: a chat that cannot save any more since its session is gone."""
    mine = store.create("m", "v", "")
    mine.save(talk("a", "b"))
    other.delete(other.find(mine.name))
    assert mine.save(talk("a", "b")) is None  # nothing new: what was deleted stays so
    assert other.names() == []
    note = mine.save(talk("a", "b", "c"))
    assert note == "chat-1 was deleted by another program: this chat is now the session chat-1"
    assert other.find("chat-1").load("v") == talk("a", "b", "c")


def test_deleting_leaves_no_word_behind(store: SessionStore, folder: Path) -> None:
    """Guards: deleted text that is still in the file: in free pages, the search index, or the log."""
    kept = store.create("m", "v", "")
    kept.save(talk("harmless"))
    for ordinal in range(20):
        session = store.create("m", "v", "xyzzysystem")
        session.save(talk(*["plugh xyzzyword 叉" * 200] * 4, system="xyzzysystem"))
        session.save(talk("xyzzyundone", system="xyzzysystem"))
        store.rename(session, f"xyzzyname {ordinal}")
        store.delete(session)
    for file in folder.iterdir():
        if not file.name.endswith("-shm"):
            assert b"xyzzy" not in file.read_bytes()
            assert "叉".encode() not in file.read_bytes()
    assert store.find(kept.name).load("v") == talk("harmless")


def test_forks_outlive_their_original(store: SessionStore) -> None:
    """Guards: turns of a fork that go with the session that first had them; undone ones kept for ever."""
    first = store.create("m", "v", "")
    first.save(talk("a", "b"))
    fork = store.fork(first)
    assert fork.name == "chat-1 2"
    fork.save(talk("a", "b", "c", "d"))
    first.save(talk("a", "undone"))
    first.save(talk("a"))
    store.delete(first)
    assert store.find(fork.name).load("v") == talk("a", "b", "c", "d")
    with fork._database.read() as connection:
        assert connection.execute("SELECT count(*) FROM turn").fetchone() == (4,)
    store.delete(fork)
    with fork._database.read() as connection:
        assert connection.execute("SELECT count(*) FROM turn").fetchone() == (0,)


def test_a_fork_of_what_was_not_loaded_and_of_nothing(store: SessionStore) -> None:
    """Guards: an empty fork."""
    session = store.create("m", "v", "")
    with pytest.raises(UsageError, match="nothing to fork"):
        store.fork(session)
    session.save(talk("a", "b", system="s"))
    fork = store.fork(store.find("1"), "  the   copy ")
    assert fork.name == "the copy"
    assert fork.load("v") == talk("a", "b", system="s")
    with pytest.raises(UsageError, match="already"):
        store.fork(session, "The Copy")


@pytest.mark.parametrize("name", ["", "  ", "12", "１２", "a\x1b[31m", "a\u202eb", "x" * 81, "a\udc80"])
def test_what_cannot_be_a_name(store: SessionStore, name: str) -> None:
    """Guards: names that a terminal obeys, that are numbers, or nothing."""
    session = store.create("m", "v", "")
    with pytest.raises(UsageError):
        store.rename(session, name)


def test_finding_by_name_number_and_beginning(store: SessionStore) -> None:
    """Guards: a beginning that wins over a whole name; a number that finds a name with that number in it."""
    for name in ("Groceries", "groceries for May", "Ärger", "42 ways"):
        session = store.create("m", "v", "")
        store.rename(session, name)
        session.save(talk(name))
    assert store.find("GROCERIES").number == 1
    named = [store.named(name) for name in ("GROCERIES", " 42  WAYS ", "groc", "1", "", "\udcff")]
    assert [session and session.number for session in named] == [1, 4, None, None, None, None]
    assert store.find("groceries  f").number == 2
    assert store.find("2").name == "groceries for May"
    assert store.find("ärg").name == "Ärger"
    assert store.find("42").name == "42 ways"
    with pytest.raises(UsageError) as error:
        store.find("gro")
    assert error.value.remedy == "type more of the name: groceries for May, Groceries"
    with pytest.raises(UsageError) as error:
        store.find("grocereis")
    assert error.value.remedy == "did you mean Groceries?"
    for text in ("", "99", "nothing like it"):
        with pytest.raises(UsageError):
            store.find(text)


def test_names_before_and_after_the_first_turn(store: SessionStore, other: SessionStore) -> None:
    """Guards: two sessions of one name, or an empty session in the list."""
    first, second = store.create("m", "v", ""), other.create("m", "v", "")
    store.rename(first, "same")
    other.rename(second, "Same")
    first.save(Transcript(system="s"))
    assert store.names() == []
    assert store.latest() is None
    assert first.save(talk("a")) is None
    assert second.save(talk("b")) == "the name Same is taken: this chat is now the session Same 2"
    assert store.names() == ["Same 2", "same"]
    same = store.find("same")
    store.rename(same, "SAME")  # only its case: it is its own
    assert first.name == "SAME"
    assert second.name == "Same 2"


def test_summaries_tell_sessions_apart(store: SessionStore) -> None:
    """Guards: lists out of order, titles of many lines, counts of undone turns."""
    one, two = store.create("m", "v", ""), store.create("n", "v", "")
    one.save(talk("first\n\nmessage " + "x" * 100, "b"))
    two.save(talk("other", "b", "c", "d"))
    two.save(talk("other", "b"))
    one.save(talk("first\n\nmessage " + "x" * 100, "b", "c"))
    found = [(each.number, each.name, each.title, each.n_turns, each.model) for each in store.summaries()]
    assert found == [
        (1, "chat-1", ("first message " + "x" * 100)[:79] + "…", 3, "m"),
        (2, "chat-2", "other", 2, "n"),
    ]
    assert store.latest() is not None
    assert store.summaries()[0].updated >= store.summaries()[1].updated > 1.7e9


def test_a_session_without_turns_is_not_the_latest(store: SessionStore) -> None:
    """Guards: --continue going on with the message that was refused, instead of the conversation before."""
    store.create("m", "v", "").save(talk("a", "b"))
    refused, emptied = store.create("m", "v", ""), store.create("m", "v", "")
    for session in (refused, emptied):
        session.save(talk("much too long"))
        session.save(Transcript())
    latest = store.latest()
    assert latest is not None
    assert latest.number == 1
    assert store.names() == ["chat-1"]
    assert [each.number for each in store.summaries()] == [1]
    store.rename(emptied, "To be written")
    assert store.names() == ["To be written", "chat-1"]
    assert [(each.number, each.n_turns) for each in store.summaries()] == [(3, 0), (1, 2)]
    assert store.find("chat-2").number == 2
    summary = store.summary(refused)
    assert summary is not None
    assert (summary.number, summary.n_turns) == (2, 0)
    store.delete(refused)
    assert store.summary(refused) is None


def test_a_failed_save_changes_nothing_and_the_next_one_has_it(
    store: SessionStore, other: SessionStore
) -> None:
    """Guards: a session that believes to be stored what is not."""
    session = store.create("m", "v", "")
    session.save(talk("a", "b"))
    session._database._writer.execute("PRAGMA busy_timeout = 0")
    with other._database.write(), pytest.raises(LockedError):
        session.save(talk("a", "b", "c"))
    assert store.find("chat-1").load("v") == talk("a", "b")
    assert session.save(talk("a", "b", "c")) is None
    assert store.find("chat-1").load("v") == talk("a", "b", "c")
