"""A JSON schema as a grammar whose every text is valid under it; keywords are read by `schema_keywords`.

The grammar is narrower than the schema: members come in the order of `properties`; an object that has those
has no others unless `additionalProperties` says so; strings and arrays have at most MAX_COUNT characters and
items; numbers have at most 15 digits. What a schema asks for and a grammar cannot keep is refused, never
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.grammar import json_values as values
from dsmoe_local.engine.grammar.nodes import NOTHING, Choice, Grammar, Node, Repeat, Rule, choice, sequence
from dsmoe_local.engine.grammar.object_keys import other_keys
from dsmoe_local.engine.grammar.pattern import pattern_content
from dsmoe_local.engine.grammar.schema_keywords import NO_TYPE, Flattener, Schema, natural_types, refuse

MAX_COUNT = 10_000
MAX_RULES = 20_000
MAX_BYTES = 1_000_000

_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DAYS = "(0[1-9]|[12][0-9]|30)"
_DATE = f"(19|20)[0-9]{{2}}-((0[13578]|1[02])-({_DAYS}|31)|(0[469]|11)-{_DAYS}|02-(0[1-9]|1[0-9]|2[0-8]))"
_LABEL = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
_HOST = rf"({_LABEL}\.){{1,5}}[a-z]{{2,12}}"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _CLOCK,
    "date-time": f"{_DATE}T{_CLOCK}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}}){{0,3}}@{_HOST}",
    "uri": rf"https?://{_HOST}(:[1-9][0-9]{{0,3}})?(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?",
}


def parse_json_schema(text: str) -> Grammar:
    """The grammar of a schema. Raises UsageError, naming the place, for what is wrong or not supported."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"the JSON schema is larger than {MAX_BYTES:,} characters")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        text.encode()  # lone surrogates are a ValueError too, and so are the infinities that 1e999 becomes
        json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise UsageError("the JSON schema is not JSON", where=str(error)) from error
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deep") from error
    return _Converter(document).convert()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _Converter:
    """One schema on its way: a rule for each schema in it, equal ones shared, so that recursive ones end."""

    def __init__(self, document: Any) -> None:  # noqa: ANN401 - any JSON value
        self._document = document
        self._flattener = Flattener(document)
        self._rules: dict[str, Node] = dict(values.RULES)
        self._names: dict[str, str] = {}
        # A worklist instead of recursion: schemas may be nested deeper than Python's stack.
        self._todo: list[tuple[str, Schema, str]] = []

    def convert(self) -> Grammar:
        """All rules, from the document's root on."""
        self._rules["root"] = self._rule(self._document, "#")
        while self._todo:
            name, schema, where = self._todo.pop()
            self._rules[name] = self._node(schema, where)
        return Grammar(self._rules)

    def _rule(self, schema: Any, where: str) -> Node:  # noqa: ANN401 - any JSON value
        flat = self._flattener.flatten(schema, where)
        key = json.dumps(flat, sort_keys=True)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"schema-{len(self._names)}"
            if len(self._names) > MAX_RULES:
                raise UsageError("the JSON schema is too large", where=where)
            self._todo.append((name, flat, where))
        return Rule(name)

    def _node(self, schema: Schema, where: str) -> Node:
        if "anyOf" in schema:
            base = {key: value for key, value in schema.items() if key != "anyOf"}
            ways = [{"allOf": [base, way]} if base else way for way in schema["anyOf"]]
            return choice(*(self._rule(way, f"{where}/anyOf/{i}") for i, way in enumerate(ways)))
        if "enum" in schema:
            return self._enum(schema, where)
        types = schema.get("type") or natural_types(schema)
        if not types:
            return values.ANY_VALUE
        return choice(*(_BUILDERS[name](self, schema, where) for name in types))

    def _enum(self, schema: Schema, where: str) -> Node:
        beside = sorted(schema.keys() - {"enum", "type"})
        if beside:
            raise refuse(where, f"{beside[0]} beside enum or const")
        allowed = schema.get("type")
        fitting = [value for value in schema["enum"] if allowed is None or _is_one_of(value, allowed)]
        return Choice(tuple(map(values.literal, fitting)))

    def _number(self, schema: Schema, where: str, *, whole: bool = False) -> Node:
        if schema.get("multipleOf", 1) != 1:
            raise refuse(where, f"multipleOf {schema['multipleOf']}")
        whole = whole or "multipleOf" in schema
        low, low_excluded = _tighter(schema, "minimum", "exclusiveMinimum", max)
        high, high_excluded = _tighter(schema, "maximum", "exclusiveMaximum", min)
        try:
            return values.number_within(values.Bounds(low, high, low_excluded, high_excluded), whole=whole)
        except UsageError as error:
            raise UsageError(f"the JSON schema cannot be met: {error.what}", where=where) from error

    def _integer(self, schema: Schema, where: str) -> Node:
        return self._number(schema, where, whole=True)

    def _string(self, schema: Schema, where: str) -> Node:
        low, high = _counts(schema, "minLength", "maxLength", where)
        bounded = low > 0 or high is not None
        forms = [key for key in ("pattern", "format") if key in schema]
        if len(forms) + bounded > 1:
            raise refuse(where, f"{' with '.join(forms)}{' with a length' if bounded else ''}")
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise refuse(where, f"format {schema['format']}")
            return values.string_of(pattern_content(f"^({FORMATS[schema['format']]})$"))
        if "pattern" in schema:
            try:
                return values.string_of(pattern_content(schema["pattern"]))
            except UsageError as error:
                raise UsageError(error.what, where=f"{where}: {error.where}") from error
        return values.string_of(Repeat(values.CHARACTER, low, high)) if bounded else values.STRING

    def _array(self, schema: Schema, where: str) -> Node:
        low, high = _counts(schema, "minItems", "maxItems", where)
        if schema.get("uniqueItems") and (high is None or high > 1):
            raise refuse(where, "uniqueItems")
        first = schema.get("prefixItems", [])
        first = first if high is None else first[:high]
        nodes = [self._rule(item, f"{where}/prefixItems/{i}") for i, item in enumerate(first)]
        # What follows the prefix may be anything or nothing; nothing is simpler.
        rest = schema.get("items", not first)
        least, most = max(low - len(first), 0), None if high is None else high - len(first)
        if rest is False or most == 0:
            if least:
                raise UsageError("the JSON schema cannot be met: minItems is too large", where=where)
            return values.array_of(_joined(nodes))
        item = self._rule(rest, f"{where}/items")
        more = sequence(values.SEPARATOR, item)
        if nodes:
            return values.array_of(sequence(_joined(nodes), Repeat(more, least, most)))
        filled = sequence(item, Repeat(more, max(least - 1, 0), None if most is None else most - 1))
        return values.array_of(filled if least else Repeat(filled, 0, 1))

    def _object(self, schema: Schema, where: str) -> Node:
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        required = list(schema.get("required", []))
        others = schema.get("additionalProperties", not properties and not required)
        for name in required:
            properties.setdefault(name, schema.get("additionalProperties", True))
        kept = {name: value for name, value in properties.items() if value is not False or name in required}
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if least > len(required):
            raise refuse(where, "minProperties above the number of required properties")
        if most is not None and most < len(kept):
            raise refuse(where, "maxProperties below the number of properties")
        if others is True and not kept and most is None:
            return values.ANY_OBJECT
        tail: Node = NOTHING
        tail_first: Node = NOTHING
        if others is not False and most != len(kept):
            value = self._rule(others, f"{where}/additionalProperties")
            item = values.member(values.string_of(other_keys(tuple(properties))), value)
            count = None if most is None else most - len(kept)
            tail = Repeat(sequence(values.SEPARATOR, item), 0, count)
            rest = Repeat(sequence(values.SEPARATOR, item), 0, None if count is None else count - 1)
            tail_first = Repeat(sequence(item, rest), 0, 1)
        return values.object_of(self._members(kept, set(required), where, tail, tail_first))

    def _members(
        self, properties: dict[str, Any], required: set[str], where: str, tail: Node, tail_first: Node
    ) -> Node:
        """The members in order, optional ones perhaps left out, then the tail.

        From the last to the first, in two forms: as what follows a member, and as what comes first. Each is a
        rule, or their size would double with every member.
        """
        after, first = tail, tail_first
        for name, schema in reversed(properties.items()):
            item = values.member(
                values.literal(name), self._rule(schema, f"{where}/properties/{_escaped(name)}")
            )
            item = self._named(item)
            with_it = sequence(values.SEPARATOR, item, after), sequence(item, after)
            if name not in required:
                with_it = choice(with_it[0], after), choice(with_it[1], first)
            after, first = self._named(with_it[0]), self._named(with_it[1])
        return first

    def _named(self, node: Node) -> Node:
        name = f"part-{len(self._rules)}"
        self._rules[name] = node
        return Rule(name)


_BUILDERS: dict[str, Callable[[_Converter, Schema, str], Node]] = {
    "object": _Converter._object,
    "array": _Converter._array,
    "string": _Converter._string,
    "number": _Converter._number,
    "integer": _Converter._integer,
    "boolean": lambda *_: values.BOOLEAN,
    "null": lambda *_: values.NULL,
    NO_TYPE: lambda *_: Choice(()),
}


def _joined(nodes: list[Node]) -> Node:
    parts = [part for node in nodes for part in (values.SEPARATOR, node)]
    return sequence(*parts[1:]) if parts else NOTHING


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _counts(schema: Schema, low_key: str, high_key: str, where: str) -> tuple[int, int | None]:
    """How many characters or items; more than MAX_COUNT are never made."""
    low, high = int(schema.get(low_key, 0)), schema.get(high_key)
    if low > MAX_COUNT:
        raise refuse(where, f"{low_key} above {MAX_COUNT:,}")
    if high is not None and high < low:
        raise UsageError(f"the JSON schema cannot be met: {high_key} is below {low_key}", where=where)
    return low, None if high is None else min(int(high), MAX_COUNT)


def _tighter(
    schema: Schema, inclusive: str, exclusive: str, tightest: Callable[[Decimal, Decimal], Decimal]
) -> tuple[Decimal | None, bool]:
    """The bound that counts of the two, and whether it is excluded itself."""
    # Through `str`: 0.1 is meant, not the double nearest to it.
    given, excluding = (
        Decimal(str(schema[key])) if key in schema else None for key in (inclusive, exclusive)
    )
    if given is None or excluding is None:
        return (excluding, True) if given is None and excluding is not None else (given, False)
    bound = tightest(given, excluding)
    return bound, bound == excluding


def _is_one_of(value: Any, types: list[str]) -> bool:  # noqa: ANN401 - any JSON value
    names = {
        bool: ("boolean",), int: ("integer", "number"), str: ("string",), list: ("array",), dict: ("object",),
        float: ("integer", "number") if isinstance(value, float) and value.is_integer() else ("number",),
    }.get(type(value), ("null",))  # fmt: skip
    return any(name in types for name in names)
