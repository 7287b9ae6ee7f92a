"""Grammars for replies with tool calls: free text up to a marker, then calls with valid arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.grammar.compile import compile_json_schema, json_rule, refusal, to_llguidance
from dsmoe_local.engine.tools.calls import Tool, Tools, is_text, may_be_text
from dsmoe_local.engine.tools.formats import ToolFormat

_SPACES = {" ": "WS", "\n": "BREAK"}
_LEXEMES = r"""
BREAK: /\n?/
WS: /[ \n]{0,4}/
TEXT: /(.|\n)*/
NAME: /[^<>\n]{1,64}/
"""


def compile_tools(form: ToolFormat, tools: Tools, json_schema: str | None = None) -> str:
    """Compile the grammar of a reply to a request with tools. An answer without calls follows `json_schema`.

    Raises UsageError if the parameters of a strict tool, or the JSON schema, cannot be enforced.
    """
    if json_schema is not None:
        compile_json_schema(json_schema)
    lark = "\n".join(_lines(form, tools, json_schema))
    compiled = to_llguidance(f"{lark}\n{_LEXEMES}")
    if reason := refusal(compiled):
        raise UsageError(f"the grammar of the tools is too complex: {reason}", remedy="pass fewer tools")
    return compiled


def _lines(form: ToolFormat, tools: Tools, json_schema: str | None) -> Iterator[str]:
    """Yield the rules. The marker before a call ends free text, since the rule `begin` is lazy."""
    several = tools.parallel and tools.only is None
    begin = json.dumps(form.begin)
    section = f"{'call' if form.single or not several else 'call+'} {_literal(form.finish)}"
    if tools.required or tools.only is not None:
        yield f"start: WS {begin} {section}" + (f" (WS {begin} {section})* WS" if several else " WS")
    elif json_schema is not None:
        yield f"start: answer | (WS {begin} {section}){'+' if several else ''} WS"
        yield f"answer: {json_rule(json.loads(json_schema))}"
    else:
        yield f"start: (begin {section})* TEXT" if several else f"start: TEXT | begin {section} WS"
        yield f"begin[lazy]: TEXT {begin}"
    offered = [tool for tool in tools.tools if tools.only in (None, tool.name)]
    yield f"call: {' | '.join(f'call{number}' for number in range(len(offered)))}"
    for number, tool in enumerate(offered):
        yield from _call(form, tool, f"call{number}")
    if form.key:
        yield f"text[lazy]: TEXT {json.dumps(form.after_value.strip())}"


def _call(form: ToolFormat, tool: Tool, rule: str) -> Iterator[str]:
    head = f"{_literal(form.before_name)} {json.dumps(tool.name)} {_literal(form.after_name)}"
    end = _literal(form.end)
    schema, properties = _enforceable(tool)
    if not form.key:
        yield f"{rule}: {head} {rule}_json {end}"
        yield f"{rule}_json: {json_rule(schema, lenient=not tool.strict)}"
        return
    arguments = []
    required = schema.get("required", ())
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for number, (name, part) in enumerate(properties.items()):
        argument = f"{rule}_{number}"
        arguments.append(argument if name in required else f"{argument}?")
        yield f"{argument}: {_literal(form.key)} {json.dumps(name)} {_literal(form.value)} {argument}_value"
        if isinstance(part, Mapping) and not may_be_text(part):
            yield f"{argument}_value: {argument}_json {_literal(form.after_value)}"
            yield f"{argument}_json: {json_rule({**part, **definitions}, lenient=not tool.strict)}"
        else:
            yield f"{argument}_value: {_text_value(form, part)}"
    if not properties and schema.get("additionalProperties") is not False:
        arguments.append(f"{rule}_any*")
        yield f"{rule}_any: {_literal(form.key)} NAME {_literal(form.value)} text"
    yield f"{rule}: {head} {' '.join(arguments)} {end}"


def _text_value(form: ToolFormat, schema: object) -> str:
    """Return the body of the rule for a string, with the marker after it."""
    values: list[object] = []
    if isinstance(schema, Mapping) and is_text(schema):
        values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if not values:
        return "text"
    return f"({' | '.join(map(json.dumps, values))}) {_literal(form.after_value)}"


def _enforceable(tool: Tool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a tool, and those of its arguments by name.

    If the tool is not strict, a schema that cannot be compiled becomes one that permits any object.

    Raises UsageError if the tool is strict.
    """
    schema = {"type": "object", **tool.schema}
    reason = refusal(to_llguidance(f"start: {json_rule(schema, lenient=not tool.strict)}\n"))
    if reason and tool.strict:
        raise UsageError(
            f"the parameters of the tool {tool.name} cannot be enforced: {reason}",
            remedy='leave out "strict", or see docs/sampling.md',
        )
    return ({"type": "object"}, {}) if reason else (schema, tool.properties)


def _literal(text: str) -> str:
    """Return a text of a ToolFormat as items of a rule."""
    words = text.split()
    items = " WS ".join(map(json.dumps, words))
    before = _SPACES.get(text[:1], "")
    after = _SPACES.get(text[-1:], "") if words else ""
    return f"{before} {items} {after}"
