"""Slash commands: what is one, what they say, what help and completion know of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.talking import chat_with

from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.commands import table as commands
from dsmoe_local.chat.commands.completion import choices
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.errors import EngineCrashError

ROOT = Path(__file__).resolve().parents[2]


def take(chat: Chat, *texts: str) -> None:
    for text in texts:
        chat.take(text)
    chat.close()


def test_every_command_is_in_help_completion_and_the_guides() -> None:
    """Guards: a command that nobody can find."""
    chat, screen = chat_with(FakeEngine())
    take(chat, "/help all")
    guide = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    offered = {choice.text.strip() for choice in choices("/", commands.COMMANDS, chat)}
    for name, command in commands.COMMANDS.items():
        names = " ".join(f"`/{word}`" for word in (name, *command.aliases))
        arguments = f" `{command.arguments}`" if command.arguments else ""
        escaped = arguments.replace("|", "\\|")
        assert f"| {names}{escaped} | {command.help} |" in guide
        assert f"/{name}" in screen.said
        assert command.help in screen.said
        assert name in offered


def test_help_of_one_command() -> None:
    """Guards: help that is always everything."""
    chat, screen = chat_with(FakeEngine())
    take(chat, "/help /undo")
    assert screen.tables == [[("/undo [N]", commands.COMMANDS["undo"].help)]]


def test_help_fits_a_small_window() -> None:
    """Guards: a list that scrolls its first commands out of a window of 80 columns and 24 lines."""
    chat, screen = chat_with(FakeEngine())
    take(chat, "/help")
    (rows,) = screen.tables
    listed = " ".join(text for _, text in rows)
    assert all(f"/{name}" in listed for name in commands.COMMANDS)
    assert sum(1 + len(text) // 60 for _, text in rows) < 20
    assert "/help all" in screen.said


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (["/system Be brief.", "a", "/clear"], "a new conversation with the same system text"),
        (["/undo"], "there is nothing to undo"),
        (
            ["a", "b", "/undo 2"],
            "2 messages and their replies; /redo 2 restores",
        ),
        (
            ["a", "b", "/undo 9", "/redo"],
            "“a” and its reply; /redo 1 restores 1 more message",
        ),
        (["a", "b", "/undo 9", "/redo 9"], "restored: 2 messages and their replies"),
        (["a", "/redo"], "there is nothing to redo"),
        (["a", "/undo", "b", "/redo"], "there is nothing to redo"),
        (["a", "/redo x"], "/redo takes a number"),
        (["a", "/undo x"], "/undo takes a number"),
        (["a", "/undo ²"], "/undo takes a number"),
        (["a", "/undo " + "9" * 5000], "/undo takes a number"),
        (["/exit strategies for startups"], "/exit takes no argument"),
        (["a", "/continue"], "the reply is complete"),
        (["/SYSTEM"], "no system text"),
        (["/edit"], "there is no message to edit yet"),
        (["a", "/edit"], "the message was not changed"),
        (["/editor"], "nothing was written"),
        (["/regen"], "there is no message to answer yet"),
        (["/continue"], "there is no reply to continue yet"),
        (["/system Be\x1b[2J brief.", "/system"], "system: Be\N{SYMBOL FOR ESCAPE}[2J brief."),
        (["/system x", "/system off"], "no system text"),
        (["/show prompt"], "there is no prompt yet"),
        (["/show nonsense"], "/show takes info, parameters, template, prompt"),
        (["/show"], "routed experts  6 of 64"),
        (["/show template"], "{{ messages }}"),
        (["/show parameters"], "temperature  0.8"),
        (["/tokens"], "there is no reply with known tokens yet"),
        (["/tokens hé"], "3 tokens"),
        (["/stats"], "no reply yet"),
        (["/stats"], "computed all on the CPU, weights repacked (faster for replies)"),
        (["a", "b", "/stats"], "all replies: 2 tokens"),
        (["/save x"], "this chat is not stored"),
        (["/frobnicate"], "/frobnicate is not a command; did you mean /help?"),
    ],
    ids=str,
)
def test_what_commands_say(inputs: list[str], said: str) -> None:
    """Guards: a command that says nothing, raises, or says it wrong."""
    chat, screen = chat_with(FakeEngine(lambda prompt: prompt[-1]))
    take(chat, *inputs)
    assert said in screen.said


@pytest.mark.parametrize("colour", [True, False])
def test_show_prompt_has_the_exact_tokens(colour: bool) -> None:
    """Guards: a prompt that is shown as it is not; half characters that break the screen; a token and its id
    that only their colours tell apart.
    """
    engine = FakeEngine(replies=["é"])
    chat, screen = chat_with(engine)
    screen.colour = colour
    take(chat, "q", "/show prompt")
    ids = engine.encode(chat.conversation.messages(), continue_final_message=True)
    assert (
        screen.shown[-1].replace("\n", " ").split()
        == " ".join(
            f"{piece if piece.strip() else ' '}[{token_id}]".strip()
            for token_id, piece in zip(ids, engine.decode(ids), strict=True)
        ).split()
    )
    assert f"{len(ids)} tokens" in screen.notices


def test_edit_in_the_editor_and_by_argument() -> None:
    """Guards: an edited message that is answered twice, or beside the old one."""
    chat, screen = chat_with(FakeEngine())
    screen.edited = "second"
    take(chat, "first", "/edit", "/edit third")
    assert [turn.content for turn in chat.conversation.turns] == ["third", "user: third"]
    assert screen.replies == ["user: first", "user: second", "user: third"]


def test_crash_is_told_and_the_next_message_goes_on() -> None:
    """Guards: a crash that ends the chat, or is not explained."""

    def die(index: int) -> None:
        if not screen.errors:
            engine.kill()
            raise EngineCrashError("the engine was killed by SIGSEGV")

    engine = FakeEngine(gate=die)
    chat, screen = chat_with(engine)
    take(chat, "a", "/continue")
    assert screen.notices[-2:] == [
        "the conversation is saved; the next message loads the model again",
        "loading the model again",
    ]
    assert screen.replies == ["", "user: a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", "help"),
        (" /quit ", "exit"),
        ("/set top_k 3", "set"),
        ("/usr/bin is a folder", None),
        ("/home/me", None),
        ("/exports/ is full", None),
        ("/HELP", "help"),
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
    assert commands.parse("/frobnicate") == commands.Unknown("frobnicate", "help")


def test_a_message_without_a_reply_does_not_leave_silently() -> None:
    """Guards: a message that was stopped before the first word of its reply, gone without a word."""
    chat, screen = chat_with(FakeEngine())
    chat.conversation.restore(Transcript(turns=(Turn(Role.USER, "a long question"),)))
    chat.send("another")
    assert any("has no reply" in notice and "a long question" in notice for notice in screen.notices)
    chat.close()
