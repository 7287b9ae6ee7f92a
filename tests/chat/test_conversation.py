"""Turns on the fake engine: what is kept, what is gone back to, what happens when the context is full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from support.fake_engine import FakeEngine

from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.conversation import Conversation, Event
from dsmoe_local.chat.settings import ChatSettings, OnFull
from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.errors import EngineCrashError, PromptError
from dsmoe_local.engine.types import FinishReason, Message, Request, TokenEvent


def talk(engine: FakeEngine, settings: ChatSettings | None = None, system: str = "") -> Conversation:
    return Conversation(engine, settings or ChatSettings(), system)


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


def said(conversation: Conversation, text: str) -> str:
    return text_of(conversation.send(text))


def contents(conversation: Conversation) -> list[str]:
    return [turn.content for turn in conversation.turns]


def test_turns_keep_exact_ids_and_the_cache() -> None:
    """Guards: replies without ids, which would be tokenized again."""
    engine = FakeEngine(replies=["héllo 🚀", "two"])
    conversation = talk(engine, system="Be brief.")
    assert said(conversation, "a") == "héllo 🚀"
    assert said(conversation, "b") == "two"
    assert [turn.role for turn in conversation.turns] == [Role.USER, Role.ASSISTANT] * 2
    assert conversation.turns[1].token_ids == tuple(byte + 1 for byte in "héllo 🚀".encode())
    assert conversation.messages()[0] == Message("system", "Be brief.")
    assert conversation.usage is not None
    assert conversation.usage.cached_tokens > len("system: Be brief.")
    assert conversation.n_used == conversation.usage.prompt_tokens + conversation.usage.completion_tokens


def test_interrupted_reply_is_kept_and_continued() -> None:
    """Guards: a partial reply thrown away, not marked as such, or continued as a new turn."""
    conversation: Conversation
    engine = FakeEngine(replies=["abcdef", "def"], gate=lambda i: conversation.cancel() if i == 3 else None)
    conversation = talk(engine)
    assert said(conversation, "q") == "abc"
    assert conversation.turns[1].ending is FinishReason.CANCELLED
    assert conversation.turns[1].unfinished
    ids = conversation.turns[1].token_ids
    assert text_of(conversation.continue_reply()) == "def"
    assert conversation.turns[1].content == "abcdef"
    assert conversation.turns[1].token_ids == (*ids, *(ord(letter) + 1 for letter in "def"))
    assert len(conversation.turns) == 2


def test_message_that_can_have_no_answer_is_not_kept() -> None:
    """Guards: a question that is too long making every next one fail too."""
    conversation = talk(FakeEngine(n_context=40))
    with pytest.raises(PromptError):
        said(conversation, "x" * 100)
    assert conversation.turns == ()


def test_message_stopped_before_its_answer_waits() -> None:
    """Guards: Ctrl-C while a long prompt is read losing the prompt; two questions in a row after it."""
    stopping = True
    conversation = talk(FakeEngine(gate=lambda i: conversation.cancel() if stopping else None))
    assert said(conversation, "long question") == ""
    assert contents(conversation) == ["long question"]
    assert conversation.unanswered
    stopping = False
    assert text_of(conversation.continue_reply()).endswith("long question")
    assert len(conversation.turns) == 2
    stopping = True
    said(conversation, "typo")
    stopping = False
    said(conversation, "question")
    assert contents(conversation)[2] == "question"


def test_message_that_an_engine_died_of_waits() -> None:
    """Guards: a crash losing what was asked, or what was said so far."""

    def die(index: int) -> None:
        if deadly and index == 2:
            raise EngineCrashError("died")

    deadly = True
    conversation = talk(FakeEngine(replies=["abcd"], gate=die))
    with pytest.raises(EngineCrashError):
        said(conversation, "q")
    assert contents(conversation) == ["q", "ab"]
    assert conversation.turns[1].unfinished
    deadly = False
    assert text_of(conversation.continue_reply()) == "abcd"
    assert contents(conversation) == ["q", "ababcd"]


def test_interruption_before_the_engine_knows_the_request() -> None:
    """Guards: a Ctrl-C that is lost between the question and its start, and a long reply that follows."""
    conversation: Conversation

    class Slow(FakeEngine):
        def submit(self, request: Request) -> Iterator[TokenEvent]:
            if interrupted:
                conversation.cancel()
            return super().submit(request)

    conversation = talk(Slow())
    interrupted = True
    assert said(conversation, "x") == ""
    assert conversation.finish_reason is FinishReason.CANCELLED
    # A Ctrl-C between two replies is none of the next one's.
    interrupted = False
    conversation.cancel()
    assert said(conversation, "y") == "user: y"


def test_stop_string_drops_the_ids() -> None:
    """Guards: ids that reach beyond the text that was shown."""
    conversation = talk(FakeEngine(replies=["one STOP two"]), ChatSettings(stop=("STOP",)))
    assert said(conversation, "q") == "one "
    assert conversation.turns[1].message == Message("assistant", "one ")


def test_regenerate_edit_and_undo() -> None:
    """Guards: regenerate dropping the wrong messages; an edited message beside the old one."""
    engine = FakeEngine(replies=["1", "2", "3", "4"])
    conversation = talk(engine)
    said(conversation, "a")
    said(conversation, "b")
    assert text_of(conversation.regenerate()) == "3"
    assert contents(conversation) == ["a", "1", "b", "3"]
    assert text_of(conversation.edit("c")) == "4"
    assert contents(conversation) == ["a", "1", "c", "4"]
    # What the cache still holds is not read again.
    assert conversation.usage is not None
    held = engine.encode(conversation.messages()[:2], continue_final_message=True)
    assert conversation.usage.cached_tokens == len(held) + len("user: ")
    assert [turn.content for turn in conversation.undo()] == ["c", "4"]
    assert contents(conversation) == ["a", "1"]
    assert len(conversation.undo(5)) == 2
    assert conversation.undo() == ()
    for action in (conversation.regenerate, conversation.continue_reply, lambda: conversation.edit("x")):
        with pytest.raises(UsageError):
            action()


def test_regenerating_keeps_the_reply_until_there_is_another() -> None:
    """Guards: a reply lost to a Ctrl-C before the first word of the next."""
    stopping = False
    conversation = talk(
        FakeEngine(replies=["one", "two"], gate=lambda i: conversation.cancel() if stopping else None)
    )
    said(conversation, "q")
    stopping = True
    assert text_of(conversation.regenerate()) == ""
    assert contents(conversation) == ["q", "one"]


def test_a_reply_of_nothing_is_a_reply() -> None:
    """Guards: a message that vanishes when the model ends its turn at once."""
    conversation = talk(FakeEngine(replies=["", "x"]))
    said(conversation, "q")
    assert contents(conversation) == ["q", ""]
    assert said(conversation, "r") == "x"


def test_base_model_starts_over_and_goes_on() -> None:
    """Guards: texts of a base model run together; earlier ones lost."""
    engine = FakeEngine(replies=["b", "c", "e"], template=False)
    conversation = talk(engine)
    said(conversation, "a")
    list(conversation.continue_reply())
    assert engine.requests[-1].prompt == engine.encode("ab")
    assert conversation.turns[-1].content == "bc"
    said(conversation, "d")
    assert engine.encode(engine.requests[-1].prompt) == engine.encode("d")
    assert contents(conversation) == ["a", "bc", "d", "e"]


def test_context_full_stops() -> None:
    """Guards: a conversation cut without a word."""
    conversation = talk(FakeEngine(lambda prompt: "x" * 500, n_context=64))
    said(conversation, "q")
    assert conversation.turns[1].ending is FinishReason.CONTEXT_FULL
    with pytest.raises(PromptError):
        said(conversation, "and now?")


def test_context_full_compacts_between_replies() -> None:
    """Guards: dropping the system text or half a turn; dropping what would still fit; saying nothing."""
    engine = FakeEngine(lambda prompt: "y" * 8, n_context=200)
    conversation = talk(engine, ChatSettings(on_full=OnFull.COMPACT), system="S")
    rooms: list[MadeRoom] = []
    for number in range(12):
        rooms += [event for event in conversation.send(f"q{number:02}") if isinstance(event, MadeRoom)]
        assert conversation.finish_reason is FinishReason.STOP
    gone = [turn for room in rooms for turn in room.turns]
    assert gone
    assert [turn.content for turn in gone[::2]] == [f"q{number:02}" for number in range(len(gone) // 2)]
    messages = conversation.messages()
    assert messages[0] == Message("system", "S")
    assert messages[1].role == "user"
    assert len(messages) - 1 + len(gone) == len(conversation.turns) == 24
    assert conversation.transcript.n_left_out == len(gone)
    # Room for half of the context at a time, not for one message each time.
    assert len(rooms) <= 3


def test_context_full_compacts_in_mid_reply() -> None:
    """Guards: a reply that ends where it could go on; one that is told twice."""
    replies = iter(["x" * 20, "y" * 500, "z" * 10])
    engine = FakeEngine(lambda prompt: next(replies), n_context=160)
    conversation = talk(engine, ChatSettings(on_full=OnFull.COMPACT))
    said(conversation, "first")
    events = list(conversation.send("second"))
    assert [event.turns[0].content for event in events if isinstance(event, MadeRoom)] == ["first"]
    reply = conversation.turns[-1]
    assert reply.content == text_of(events)
    assert reply.content.rstrip("z").rstrip("y") == ""
    assert reply.content.endswith("yz" + "z" * 9)
    assert conversation.finish_reason is FinishReason.STOP


def test_compacting_gives_up_where_one_message_fills_the_context() -> None:
    """Guards: a loop that makes room where there is none."""
    engine = FakeEngine(lambda prompt: "x" * 500, n_context=64)
    conversation = talk(engine, ChatSettings(on_full=OnFull.COMPACT))
    assert not [event for event in conversation.send("q") if isinstance(event, MadeRoom)]
    assert conversation.finish_reason is FinishReason.CONTEXT_FULL


def test_undo_brings_back_what_left_the_context() -> None:
    """Guards: an empty context after an undo beyond what was compacted."""
    engine = FakeEngine(lambda prompt: "y" * 8, n_context=120)
    conversation = talk(engine, ChatSettings(on_full=OnFull.COMPACT))
    for number in range(6):
        said(conversation, f"q{number}")
    left_out = conversation.transcript.n_left_out
    assert left_out
    conversation.undo(6 - left_out // 2)
    assert len(conversation.turns) == left_out
    assert conversation.transcript.n_left_out == 0
    assert conversation.messages()[0].content == "q0"


def test_transcript_brings_a_conversation_back() -> None:
    """Guards: going on with other tokens than before, or with what had left the context."""
    engine = FakeEngine(lambda prompt: "y" * 8, n_context=120)
    conversation = talk(engine, ChatSettings(on_full=OnFull.COMPACT), system="S")
    for number in range(6):
        said(conversation, f"q{number}")
    other = talk(engine)
    other.restore(conversation.transcript)
    assert other.context_ids() == conversation.context_ids()
    assert other.n_used == len(other.context_ids())
    assert other.turns[-1] == Turn(
        Role.ASSISTANT, "y" * 8, (ord("y") + 1,) * 8, FinishReason.STOP, conversation.usage
    )


@pytest.mark.parametrize("on_full", [OnFull.COMPACT, OnFull.SHIFT])
def test_message_that_is_too_long_costs_nothing(on_full: OnFull) -> None:
    """Guards: a conversation that is forgotten for a message that cannot fit anyway."""
    conversation = talk(FakeEngine(lambda prompt: "ok", n_context=200), ChatSettings(on_full=on_full))
    for text in ("my name is Bob", "second message"):
        said(conversation, text)
    before = (conversation.transcript, conversation.n_used)
    events: list[Event] = []
    with pytest.raises(PromptError):
        events.extend(conversation.send("x" * 300))
    assert not [event for event in events if isinstance(event, MadeRoom)]
    assert (conversation.transcript, conversation.n_used) == before
    assert said(conversation, "third") == "ok"


def test_going_back_never_cuts_the_question() -> None:
    """Guards: what was shifted out of a long conversation being cut from a short one, question and all."""
    engine = FakeEngine(lambda prompt: "y" * 20, n_context=200)
    conversation = talk(engine, ChatSettings(on_full=OnFull.SHIFT))
    for number in range(6):
        said(conversation, f"message {number}")
    assert conversation.transcript.n_shifted
    conversation.settings = ChatSettings(on_full=OnFull.STOP)
    conversation.undo(5)
    said(conversation, "what is two plus two?")
    asked = bytes(token_id - 1 for token_id in engine.encode(engine.requests[-1].prompt)).decode()
    assert "user: what is two plus two?" in asked


def test_question_that_a_shift_cut_is_asked_again_whole() -> None:
    """Guards: /regen after a shift in mid-reply sending half a question."""
    replies = iter(["z" * 150, "again"])
    engine = FakeEngine(lambda prompt: next(replies), n_context=200)
    conversation = talk(engine, ChatSettings(on_full=OnFull.SHIFT))
    said(conversation, "q" * 120)
    assert conversation.transcript.n_shifted
    assert text_of(conversation.regenerate()) == "again"
    asked = bytes(token_id - 1 for token_id in engine.encode(engine.requests[-1].prompt)).decode()
    assert "q" * 120 in asked


def test_shifted_reply_goes_on_where_it_was() -> None:
    """Guards: /continue after a shift starting over, or refusing for lack of room."""
    conversation: Conversation
    replies = iter(["z" * 400, "w" * 30])
    engine = FakeEngine(
        lambda prompt: next(replies),
        n_context=200,
        gate=lambda i: conversation.cancel() if i == 300 else None,
    )
    conversation = talk(engine, ChatSettings(on_full=OnFull.SHIFT))
    said(conversation, "q")
    assert text_of(conversation.continue_reply()) == "w" * 30
    assert conversation.turns[-1].content == "z" * 300 + "w" * 30
    assert len(engine.encode(engine.requests[-1].prompt)) < 200
