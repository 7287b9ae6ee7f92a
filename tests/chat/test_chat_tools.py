"""Tool calls in the chat: blocks in the text of a reply. Later prompts have them as the model wrote them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.talking import chat_with

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.one_shot import answer
from dsmoe_local.chat.partial_reply import CallBlocks
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.cli.prompt_input import read_tools
from dsmoe_local.engine.types import CallDelta, FinishReason, TokenEvent, Tool, Tools

TOOLS = Tools((Tool("f"), Tool("g")))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'


def test_calls_are_blocks_of_a_reply() -> None:
    """Guards: a call that is shown with its markers, or not at all; a prompt that loses it."""
    engine = FakeEngine(replies=[f"Let me see.\n{CALL}", "yes"])
    conversation = Conversation(engine, ChatSettings())
    conversation.tools = TOOLS
    list(conversation.send("hi"))
    assert conversation.turns[-1].content == 'Let me see.\n\n```tool_call\nf {"a": "x"}\n```'
    list(conversation.send("and?"))
    assert [request.tools for request in engine.requests] == [TOOLS, TOOLS]
    ids = engine.requests[1].prompt
    assert CALL.encode() in bytes(item - 1 for item in ids if isinstance(item, int))


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([("", (CallDelta(0, "{}", "1", "f"),))], "```tool_call\nf {}\n```"),
        (
            [("", (CallDelta(0, "{", "1", "f"), CallDelta(0, "}"))), ("", (CallDelta(1, "{}", "2", "g"),))],
            "```tool_call\nf {}\n```\n\n```tool_call\ng {}\n```",
        ),
        (
            [("a", (CallDelta(0, "{", "1", "f"),)), ("b", (CallDelta(0, "}"),))],
            "a\n\n```tool_call\nf {}\n```\n\nb",
        ),
        ([("a", ()), ("b", ())], "ab"),
    ],
)
def test_blocks(events: list[tuple[str, tuple[CallDelta, ...]]], text: str) -> None:
    """Guards: blocks that are not closed, or that run into the text or each other."""
    blocks = CallBlocks()
    shown = [blocks.shown(TokenEvent("r", piece, 0.0, 1, calls=calls)).text for piece, calls in events]
    end = blocks.shown(TokenEvent("r", "", 0.0, finish_reason=FinishReason.STOP))
    assert "".join([*shown, end.text]) == text


@pytest.mark.parametrize(
    ("template", "offered", "is_told"),
    [("{{ messages }}", True, True), ("{{ messages }}", False, False), ("tools <tool_call>", True, False)],
)
def test_a_template_without_tools_is_told(template: str, offered: bool, is_told: bool) -> None:
    """Guards: poor calls of a model that was not trained for tools, without a word about the reason."""
    engine = FakeEngine()
    engine.info = replace(engine.info, template_text=template)
    chat, screen = chat_with(engine)
    chat.conversation.tools = TOOLS if offered else None
    chat.begin()
    assert any("knows no tools" in notice for notice in screen.notices) is is_told
    notes = io.StringIO()
    answer(chat.conversation, "hi", io.StringIO(), notes=notes)
    assert ("knows no tools" in notes.getvalue()) is is_told


def test_a_base_model_takes_no_tools() -> None:
    """Guards: tools that are ignored in silence."""
    conversation = Conversation(FakeEngine(template=False), ChatSettings())
    conversation.tools = TOOLS
    with pytest.raises(UsageError, match="no chat template"):
        list(conversation.send("hi"))


def test_files_of_tools(tmp_path: Path) -> None:
    """Guards: a mistake in the file that is reported without it."""
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"type": "function", "function": {"name": name}} for name in "fg"]))
    assert read_tools(str(path)) == TOOLS
    for wrong, message in (("[", "not JSON"), ("{}", "tools is not a list"), ('["f"]', "tools[0]: the type")):
        path.write_text(wrong)
        with pytest.raises(DsmoeError) as refusal:
            read_tools(str(path))
        assert message in str(refusal.value)
        assert "tools.json" in str(refusal.value)
