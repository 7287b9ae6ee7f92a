'''What a block of lines between """ is: the grammar that both terminals and the chat follow.'''

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.talking import chat_with

from dsmoe_local.chat import multiline
from dsmoe_local.chat.turns import Role

Q = multiline.MARK


@pytest.mark.parametrize(
    ("text", "is_open", "content"),
    [
        ("", False, None),
        ("text", False, None),
        (f"{Q}Return the sum.{Q}", False, None),
        (f"{Q}Return the sum.\n", False, None),
        (f" {Q}\na", False, None),
        (f"a\n{Q}\nb\n{Q}", False, None),
        (Q, True, ""),
        (f"{Q}\n", True, ""),
        (f"{Q}\na", True, "a"),
        (f"{Q}\na\n", True, "a"),
        (f"{Q}\n{Q}", False, ""),
        (Q + Q, False, ""),
        (f"{Q}\na\n{Q}", False, "a"),
        (f"{Q}\na\n{Q}\n", False, "a"),
        (f"{Q}\na\nb{Q}", False, "a\nb"),
        (f"{Q}\n{Q}a\nb{Q}", False, f"{Q}a\nb"),
        (f"{Q}\ndef f():\n    {Q}Doc.{Q}", True, f"def f():\n    {Q}Doc.{Q}"),
        (f"{Q}\n/exit\n{Q}", False, "/exit"),
    ],
)
def test_grammar(text: str, is_open: bool, content: str | None) -> None:
    """Guards: a docstring taken for a block; a line of code with its own quotes that closes one."""
    assert multiline.is_open(text) is is_open
    assert multiline.content(text) == content


@given(st.text(f"a{Q[0]}\n /"))
def test_quoted_text_is_a_block_of_it(text: str) -> None:
    """Guards: pasted quotes that are lost or that end the block they are in."""
    quoted = multiline.quoted(text)
    assert not multiline.is_open(quoted)
    assert multiline.content(quoted) == text.strip("\n")


def test_the_chat_follows_it() -> None:
    """Guards: a chat with another opinion than the terminal: marks sent to the model, empty messages sent."""
    chat, _ = chat_with(FakeEngine())
    for text in (f"{Q}\n/exit\n{Q}", f"{Q}one{Q}", Q + Q, f"{Q}\n\n{Q}"):
        assert chat.take(text)
    chat.close()
    asked = [turn.content for turn in chat.conversation.turns if turn.role is Role.USER]
    assert asked == ["/exit", f"{Q}one{Q}"]


def test_a_reply_goes_on_with_the_text_before() -> None:
    """Guards: a continuation that the screen takes for a reply of its own."""
    chat, screen = chat_with(FakeEngine(replies=["one", "two", "three"]))
    for text in ("/set max_tokens 2", "question", "/continue", "/regen"):
        chat.take(text)
    chat.close()
    assert screen.went_on == ["", screen.replies[0], ""]
    assert screen.replies[0]


def test_a_reply_goes_on_with_its_spaces() -> None:
    """Guards: the indent of a line of code lost, where a reply was cut before it."""
    chat, screen = chat_with(FakeEngine(replies=["\n ```\nif a:\ncut", "    b()\n```"]))
    for text in ("/set max_tokens 12", "question", "/continue"):
        chat.take(text)
    chat.close()
    assert screen.replies == ["```\nif a:\n", "    b()\n```"]
