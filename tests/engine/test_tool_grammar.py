"""Grammars of replies with tools: they permit what templates render, and arguments that follow the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from support.grammar_texts import belongs, random_text
from support.grammar_texts import tools as compiled
from support.tool_templates import CLOCK, NATIVE, SCHEMA, TOOLS, WEATHER, form_of, parsed, written

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.tools.calls import Tool, Tools
from dsmoe_local.engine.tools.formats import HERMES, ToolFormat

ARGUMENTS: dict[str, Any] = {"city": "Paris", "days": 3, "unit": "C", "tags": ["a"], "when": None}
ONE = (("get_weather", ARGUMENTS),)
TWO: tuple[tuple[str, dict[str, Any]], ...] = (*ONE, ("get_weather_now", {}))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("offered", "calls", "content", "permitted"),
    [
        (Tools(TOOLS), (), "Hello.", True),
        (Tools(TOOLS), (), "", True),
        (Tools(TOOLS), ONE, "Let me see.", True),
        (Tools(TOOLS), TWO, "Let me see.", True),
        (Tools(TOOLS, required=True), TWO, "", True),
        (Tools(TOOLS, required=True), ONE, "Let me see.", False),
        (Tools(TOOLS, required=True), (), "Hello.", False),
        (Tools(TOOLS, required=True), (), "", False),
        (Tools(TOOLS, parallel=False), ONE, "Let me see.", True),
        (Tools(TOOLS, parallel=False), TWO, "", False),
        (Tools(TOOLS, only="get_weather"), ONE, "", True),
        (Tools(TOOLS, only="get_weather"), TWO, "", False),
        (Tools(TOOLS, only="get_weather_now"), ONE, "", False),
        (Tools((CLOCK,)), ONE, "", False),
        (Tools(TOOLS), (("get_weather", {"city": "x"}),), "", True),
        (Tools(TOOLS), (("get_weather", {"days": 3}),), "", False),
        (Tools(TOOLS), (("get_weather", {"city": "x", "days": "soon"}),), "", False),
        (Tools(TOOLS), (("get_weather", {"city": "x", "unit": "K"}),), "", False),
        (Tools(TOOLS), (("get_weather", {"city": "x", "other": 1}),), "", False),
        (Tools(TOOLS), (("get_weather_now", {"city": "x"}),), "", False),
    ],
)
def test_what_is_permitted(
    name: str, offered: Tools, calls: tuple[tuple[str, dict[str, Any]], ...], content: str, permitted: bool
) -> None:
    """Guards: a correct call that is refused; an unknown tool or invalid arguments that are permitted."""
    reply = written(name, *calls, content=content) if calls else content
    assert belongs(compiled(form_of(name), offered), reply) == permitted


BOUNDED = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F", 'a "b"']},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 5}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["unit", "place"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_valid(name: str, seed: int) -> None:
    """Guards: a constrained call that the parser does not read, or whose arguments violate the schema."""
    form, rng = form_of(name), random.Random(seed)
    grammar = compiled(form, Tools((Tool("get_weather", parameters=json.dumps(BOUNDED)),), required=True))
    texts = [text for _ in range(6) if (text := random_text(grammar, rng)) is not None]
    assert texts
    for text in texts:
        content, calls = parsed(form, text.decode())
        assert not content
        assert calls
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), BOUNDED)


def test_an_answer_without_calls_follows_the_schema() -> None:
    """Guards: a response_format that tools turn off, and one that forbids calls."""
    grammar = compiled(HERMES, Tools(TOOLS), json.dumps({"type": "object", "required": ["a"]}))
    assert belongs(grammar, '{"a": 1}')
    assert belongs(grammar, written("hermes", *TWO).lstrip())
    assert not belongs(grammar, "Hello")
    with pytest.raises(UsageError, match="the JSON schema"):
        compiled(HERMES, Tools(TOOLS), '{"not": {}}')


@pytest.mark.parametrize("form", [HERMES, form_of("glm-4.5")])
def test_schemas_that_cannot_be_enforced(form: ToolFormat) -> None:
    """Guards: one odd schema of a client that makes all its requests fail; `strict` that is not kept."""
    odd = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}}
    hopeless = {"type": "object", "properties": {"a": {"$ref": "https://example.org/a.json"}}}
    for schema in (odd, hopeless):
        assert belongs(compiled(form, Tools((Tool("f", parameters=json.dumps(schema)),))), "Hello")
        with pytest.raises(UsageError, match="the tool f cannot be enforced"):
            compiled(form, Tools((Tool("f", parameters=json.dumps(schema), strict=True),)))


@pytest.mark.parametrize("schema", ["{}", '{"type": "object"}', '{"anyOf": [{"required": ["a"]}, {}]}'])
@pytest.mark.parametrize("name", NATIVE)
def test_schemas_without_listed_arguments(name: str, schema: str) -> None:
    """Guards: an open schema that permits no arguments, or a grammar that does not compile."""
    grammar = compiled(form_of(name), Tools((Tool("get_weather", parameters=schema),)))
    assert belongs(grammar, written(name, ("get_weather", {})))
    assert belongs(grammar, written(name, ("get_weather", {"a": "b"})))


@pytest.mark.parametrize("name", ["hermes", "glm-4.5"])
def test_many_tools(name: str) -> None:
    """Guards: limits of the grammar that the tools of an agent exceed."""
    many = tuple(
        Tool(f"tool_{index}", parameters=json.dumps({**SCHEMA, "additionalProperties": True}))
        for index in range(80)
    )
    grammar = compiled(form_of(name), Tools((*many, WEATHER)))
    assert belongs(grammar, written(name, *ONE))
