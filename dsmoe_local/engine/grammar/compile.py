"""Compiles GBNF and JSON schemas to llguidance grammars. Needs no vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.grammar.gbnf import parse_gbnf
from dsmoe_local.engine.grammar.lark import to_lark

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""Limits the cost of a hostile grammar: 100,000 lexer states of 1 to 2 KB are at most 200 MB. llguidance's
other limits are its defaults: about 20 ms to compile the lexemes, and 20 ms for the mask of a token.
"""

# One space, or a line break with indentation: a small model may write endless whitespace if it is allowed.
JSON_OPTIONS: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": True,
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n {0,40})",
}
_VALUES = frozenset({"const", "default", "enum", "examples"})  # keywords whose values are not schemas
_MAX_REASON = 200


def compile_grammar(*, grammar: str | None = None, json_schema: str | None = None) -> str:
    """Compile the grammar, or the schema if `grammar` is None. Raises UsageError.

    Compiling recurses over rules and references, so the calling thread needs a large stack.
    """
    return compile_json_schema(json_schema or "") if grammar is None else compile_gbnf(grammar)


def compile_gbnf(text: str) -> str:
    """Compile GBNF. Raises UsageError; for a syntax error, `where` is the line and column."""
    compiled = to_llguidance(to_lark(parse_gbnf(text)))
    if reason := refusal(compiled):
        raise UsageError(
            f"the grammar is too complex: {reason}", remedy="use smaller repetitions and fewer rules"
        )
    return compiled


def compile_json_schema(text: str) -> str:
    """Compile a JSON schema. Raises UsageError if it is malformed or has keywords that cannot be enforced."""
    try:
        schema = json.loads(text)
        if schema is True:
            text, schema = "{}", {}
        if not isinstance(schema, dict):
            raise UsageError("the JSON schema is not an object", remedy="use {} to permit every JSON text")
        # llguidance's parser is stricter: no NaN, no lone surrogates, at most 128 levels.
        plain = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be read: {_reason(str(error))}") from error
    compiled = to_llguidance(f"start: {json_rule(schema)}\n")
    if reason := refusal(compiled):
        # The message for the schema alone is better: it does not mention the Lark grammar around it.
        raise UsageError(
            f"the JSON schema cannot be enforced: {refusal(plain) or reason}", remedy="see docs/sampling.md"
        )
    return compiled


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return the body of a Lark rule for the JSON texts of a schema.

    If `lenient`, keywords that cannot be enforced are ignored.
    """
    options = {**JSON_OPTIONS, "lenient": lenient}
    return f"%json {json.dumps({**_discriminated(schema), 'x-guidance': options})}"


def _discriminated(schema: Any) -> Any:  # noqa: ANN401 - any part of a JSON text
    """Return the schema with OpenAPI discriminators as required properties.

    llguidance reads `oneOf` as `anyOf`, and pydantic does not require a discriminator that has a default. So
    `{}` would be permitted, although it matches several alternatives.
    """
    if isinstance(schema, list):
        return [_discriminated(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    schema = {key: value if key in _VALUES else _discriminated(value) for key, value in schema.items()}
    match schema:
        case {"oneOf": list(ways), "discriminator": {"propertyName": str(name)}}:
            schema["oneOf"] = [{"allOf": [way, {"required": [name]}]} for way in ways]
    return schema


def to_llguidance(lark: str) -> str:
    """Wrap a Lark grammar for llguidance. With `no_forcing`, every tokenization of a text is permitted."""
    return LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{lark}')


def refusal(grammar: str) -> str:
    """Return the reason why llguidance cannot compile the grammar; "" if it can."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return _reason(messages[0]) if is_error else ""


def _reason(message: str) -> str:
    """Return an error message of llguidance on one line."""
    return safe_line(re.sub(r"\s+", " ", message), _MAX_REASON)
