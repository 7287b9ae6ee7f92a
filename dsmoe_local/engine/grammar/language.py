"""A request's grammar or JSON schema as text that llguidance compiles; refused here if it cannot be."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.grammar.gbnf import parse_gbnf
from dsmoe_local.engine.grammar.lark import to_lark

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""What a hostile grammar may cost: at most some 200 MB for the states of a lexer (1 to 2 KB each). The other
bounds are llguidance's own: some 20 ms to compile the lexemes, and as much for the mask of a token.
"""

# One blank, or a new line and its indentation: a small model that may write blanks for ever does so.
_JSON: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": True,
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n {0,40})",
}
_VALUES = frozenset({"const", "default", "enum", "examples"})  # keywords whose values are no schemas
_LONGEST_REASON = 200


def language_of(*, grammar: str | None = None, json_schema: str | None = None) -> str:
    """The one that is given, compiled as far as it can be without a vocabulary. Raises UsageError.

    Recursive over rules and references: call it, and its two parts, where the stack is large.
    """
    return json_schema_language(json_schema or "") if grammar is None else gbnf_language(grammar)


def gbnf_language(text: str) -> str:
    """The grammar that GBNF `text` writes. UsageError with line and column if it cannot be read."""
    language = _language(to_lark(parse_gbnf(text)))
    if reason := _refusal(language):
        raise UsageError(
            f"the grammar is too complex: {reason}", remedy="use smaller repetitions and fewer rules"
        )
    return language


def json_schema_language(text: str) -> str:
    """The grammar of a JSON schema's texts. UsageError if it is no schema, or has what cannot be kept."""
    try:
        schema = json.loads(text)
        if schema is True:
            text, schema = "{}", {}
        if not isinstance(schema, dict):
            raise UsageError("a JSON schema is an object", remedy="{} permits every JSON text")
        # llguidance's reader is stricter: no NaN, no half of a surrogate pair, at most 128 levels.
        plain = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be read: {_reason(str(error))}") from error
    schema = {**_discriminated(schema), "x-guidance": _JSON}
    language = _language(f"start: %json {json.dumps(schema)}\n")
    if reason := _refusal(language):
        # Without the Lark around it, llguidance speaks of the schema alone.
        raise UsageError(
            f"the JSON schema cannot be kept: {_refusal(plain) or reason}", remedy="see docs/sampling.md"
        )
    return language


def _discriminated(schema: Any) -> Any:  # noqa: ANN401 - any part of a JSON text
    """The schema with OpenAPI's discriminators required, which keep the alternatives of a `oneOf` apart.

    llguidance reads `oneOf` as `anyOf`. pydantic, which writes discriminators, does not require them if they
    have a default: then `{}` would be permitted, and be valid under several alternatives.
    """
    if isinstance(schema, list):
        return [_discriminated(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value if key in _VALUES else _discriminated(value) for key, value in schema.items()}
    match schema:
        case {"oneOf": list(ways), "discriminator": {"propertyName": str(name)}}:
            schema["oneOf"] = [{"allOf": [way, {"required": [name]}]} for way in ways]
    return schema


def _language(lark: str) -> str:
    """llguidance's form of a grammar, of which every way to cut a text into tokens is permitted."""
    return LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{lark}')


def _refusal(language: str) -> str:
    """Why llguidance cannot compile the grammar; "" if it can."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(language, limits=LIMITS)
    return _reason(messages[0]) if is_error else ""


def _reason(message: str) -> str:
    """llguidance's words on one line, without its drawing of the place."""
    return safe_line(re.sub(r"\s+", " ", message), _LONGEST_REASON)
