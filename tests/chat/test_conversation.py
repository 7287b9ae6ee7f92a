"""Turns, settings and commands on the fake engine: what is kept, what is said, what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.commands import table as commands
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.screen import Screen
from dsmoe_local.chat.settings import SETTINGS, ChatSettings, change, get_setting, setting_name
from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.fake import FakeEngine
from dsmoe_local.engine.types import FinishReason, Message, Request, TokenEvent


def talk(engine: FakeEngine, settings: ChatSettings | None = None, system: str = "") -> Conversation:
    return Conversation(engine, settings or ChatSettings(), system)


def said(conversation: Conversation, text: str) -> str:
    return "".join(event.text for event in conversation.send(text))


def test_turns_keep_exact_ids_and_the_cache() -> None:
    """Guards: replies without ids, which would be tokenized again."""
    engine = FakeEngine(replies=["héllo 🚀", "two"])
    conversation = talk(engine, system="Be brief.")
    assert said(conversation, "a") == "héllo 🚀"
    assert said(conversation, "b") == "two"
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    assert conversation.turns[1].token_ids == tuple(byte + 1 for byte in "héllo 🚀".encode())
    assert conversation.prompt()[0] == Message("system", "Be brief.")
    assert conversation.usage is not None
    assert conversation.usage.cached_tokens > len("system: Be brief.")


def test_interrupted_reply_is_kept_and_continued() -> None:
    """Guards: a partial reply thrown away, or continued as a new turn."""
    conversation: Conversation
    engine = FakeEngine(replies=["abcdef", "def"], gate=lambda i: conversation.cancel() if i == 3 else None)
    conversation = talk(engine)
    assert said(conversation, "q") == "abc"
    assert conversation.finish_reason is FinishReason.CANCELLED
    ids = conversation.turns[1].token_ids
    assert "".join(event.text for event in conversation.go_on()) == "def"
    assert conversation.turns[1].content == "abcdef"
    assert conversation.turns[1].token_ids == (*ids, *(ord(letter) + 1 for letter in "def"))
    assert len(conversation.turns) == 2


def test_failed_or_unanswered_message_is_not_kept() -> None:
    """Guards: a question without an answer making the next one fail too."""
    conversation = talk(FakeEngine(n_context=40))
    with pytest.raises(PromptError):
        said(conversation, "x" * 100)
    assert conversation.turns == []
    conversation.engine = FakeEngine(gate=lambda i: conversation.cancel())
    assert said(conversation, "x") == ""
    assert conversation.turns == []


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
    assert conversation.turns[1] == Message("assistant", "one ")


def test_regenerate_and_undo() -> None:
    """Guards: regenerate dropping the wrong messages."""
    conversation = talk(FakeEngine(replies=["1", "2", "3"]))
    said(conversation, "a")
    said(conversation, "b")
    assert "".join(event.text for event in conversation.regenerate()) == "3"
    assert [turn.content for turn in conversation.turns] == ["a", "1", "b", "3"]
    assert conversation.undo()
    assert [turn.content for turn in conversation.turns] == ["a", "1"]
    assert conversation.undo()
    assert not conversation.undo()
    for action in (conversation.regenerate, conversation.go_on):
        with pytest.raises(UsageError):
            action()


def test_base_model_starts_over_and_goes_on() -> None:
    """Guards: texts of a base model run together."""
    engine = FakeEngine(replies=["b", "c", "e"], template=False)
    conversation = talk(engine)
    said(conversation, "a")
    list(conversation.go_on())
    assert engine.requests[-1].prompt == engine.encode("ab")
    assert conversation.turns[-1].content == "bc"
    said(conversation, "d")
    assert conversation.turns[0] == Message("user", "d")
    assert len(conversation.turns) == 2


def test_settings_are_read_checked_and_used() -> None:
    """Guards: a setting that is shown but not used; a value out of range taken."""
    settings = ChatSettings()
    for name, text, value in (
        ("temperature", "0.2", 0.2),
        ("top_k", "0", 0),
        ("seed", "5", 5),
        ("seed", "none", None),
        ("max_tokens", "9", 9),
        ("stop", "\\n", ("\n",)),
        ("stop", "用户é:\\n", ("用户é:\n",)),
    ):
        settings = change(settings, name, text)
        assert get_setting(settings, name) == value
    assert set(SETTINGS) >= {"min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
    for name, text in (
        ("temperature", "hot"),
        ("top_p", "2"),
        ("max_tokens", "0"),
        ("seed", "-7"),
        ("top_k", "1.5"),
    ):
        with pytest.raises(UsageError):
            change(settings, name, text)
    assert setting_name("top-k") == "top_k"
    with pytest.raises(UsageError, match="tempe"):
        setting_name("tempereture")
    engine = FakeEngine()
    said(talk(engine, settings), "x")
    assert engine.requests[0].max_tokens == 9
    assert engine.requests[0].sampling.temperature == 0.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", "help"),
        (" /quit ", "exit"),
        ("/set top_k 3", "set"),
        ("/usr/bin is a folder", None),
        ("/home", None),
        ("//", None),
        ("hello /help", None),
        ("", None),
    ],
)
def test_only_known_names_are_commands(text: str, expected: str | None) -> None:
    """Guards: a path that cannot be sent; a command sent as a message."""
    parsed = commands.parse(text)
    if expected is None:
        assert parsed is None
    else:
        assert isinstance(parsed, tuple)
        assert parsed[0] is commands.COMMANDS[expected]
    assert commands.parse("/claer") == commands.Unknown("claer", "clear")


def test_screen_is_plain_where_it_must_be() -> None:
    """Guards: escape codes in redirected output; control characters of a model obeyed; markup read."""
    out = io.StringIO()
    screen = Screen(Console(file=out, highlight=False, markup=False))
    conversation = talk(FakeEngine(replies=["  [b]x[/b]\x1b[2J\x07"]))
    screen.reply(conversation.send("q"), trim=True)
    assert out.getvalue() == "[b]x[/b]\N{SYMBOL FOR ESCAPE}[2J\N{SYMBOL FOR BELL}\n"
