"""Tool calls in replies: what templates of the families render is parsed back; anything else stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tool_templates import NATIVE, OFFERED, TOOLS, form_of, parsed, talk, written

from dsmoe_local.engine.tools.formats import HERMES, format_of
from dsmoe_local.engine.tools.parser import ToolParser
from dsmoe_local.engine.tools.support import definition

ARGUMENTS = st.fixed_dictionaries(
    {"city": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)},
    optional={
        "days": st.integers(-(10**20), 10**20),
        "unit": st.sampled_from(["C", "F"]),
        "tags": st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"))),
        "when": st.none() | st.sampled_from(["today", "a b", "</tool_call", '"'])
    },
)  # fmt: skip
CALLS = st.lists(
    st.tuples(st.just("get_weather"), ARGUMENTS) | st.tuples(st.just("get_weather_now"), st.just({})),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("name", NATIVE)
@given(calls=CALLS, content=st.sampled_from(["", "Let me see.", "a <tool"]), size=st.integers(1, 9))
def test_calls_of_a_template_are_parsed(
    name: str, calls: list[tuple[str, dict[str, Any]]], content: str, size: int
) -> None:
    """Guards: text of an argument taken for a marker, a wrong type, an argument cut where a token ends."""
    reply = written(name, *calls, content=content)
    text, found = parsed(form_of(name), reply, size)
    assert text == content
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert [call.index for call in found] == list(range(len(calls)))


@pytest.mark.parametrize("name", NATIVE)
def test_arguments_are_streamed(name: str) -> None:
    """Guards: a long argument that arrives only with its last token."""
    reply = written(name, ("get_weather", {"city": "x" * 50}))
    parser = ToolParser(form_of(name), OFFERED)
    end = reply.index("x" * 50) + 25
    calls = [call for char in reply[:end] for call in parser.feed(char).calls]
    assert calls[0].name == "get_weather"
    assert "".join(call.arguments for call in calls).endswith('{"city": "' + "x" * 25)
    assert parser.holds


FRAGMENTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", '{"name": "get_weather"', ', "arguments": ', "{", "}", "get_weather",
         "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<arg_key>", "</arg_value>",
         "city", "<function=get_weather>", "<parameter=city>", "</function>", "\n", " ", '"', "```json\n"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
@given(text=FRAGMENTS | st.text(max_size=30), size=st.integers(1, 5))
def test_malformed_calls_are_text(name: str, text: str, size: int) -> None:
    """Guards: malformed output that raises an error or is lost, and results that depend on the tokens."""
    form = form_of(name)
    found = parsed(form, text, size)
    assert found == parsed(form, text)
    if not found[1]:
        assert found[0] == text


@pytest.mark.parametrize(
    ("reply", "text", "arguments"),
    [
        ('{"name": "get_weather", "arguments": {"city": "x"}}', "", ['{"city": "x"}']),
        (' {"name":"get_weather","arguments":{}}\n', "", ["{}"]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"a": 1}', '{"a": 1}', []),
        (
            '<tool_call>{"name": "other", "arguments": {}}',
            '<tool_call>{"name": "other", "arguments": {}}',
            [],
        ),
        ('a <tool_call>{"name": "get_we', 'a <tool_call>{"name": "get_we', []),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "x', "", ['{"city": "x']),
        ('<tool_call>{"name": "get_weather", "arguments": {}} oops', "oops", ["{}"]),
        ("a </tool_call> b", "a </tool_call> b", []),
    ],
)
def test_calls_without_markers_and_cut_calls(reply: str, text: str, arguments: list[str]) -> None:
    """Guards: a bare JSON call shown as text, and an answer in JSON taken for a call."""
    found = parsed(HERMES, reply, 1)
    assert (found[0], [call.arguments for call in found[1]]) == (text, arguments)


@pytest.mark.parametrize("name", NATIVE)
def test_formats_are_found_by_their_markers(name: str) -> None:
    """Guards: GLM's or Qwen3-Coder's markers taken for Hermes', which begin likewise."""
    assert form_of(name).name == name.replace("glm-4.7", "glm-4.5")
    assert format_of(NATIVE[name].replace("tools", "x")) is None


def test_definitions_are_those_of_openai() -> None:
    """Guards: a key that templates do not expect."""
    assert [definition(tool)["function"].keys() for tool in TOOLS] == [
        {"name", "description", "parameters"},
        {"name"},
    ]
    assert talk(("get_weather_now", {}))[1].tool_calls[0].arguments == "{}"
