"""The keywords of JSON schemas: which are known, what they take, how several schemas become one. No grammars.

Conjunctions (`$ref` with its neighbours, `allOf`) are merged away; `oneOf` becomes `anyOf` where no value
that would be generated is valid under two of its schemas.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeAlias
from urllib.parse import unquote

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

Schema: TypeAlias = dict[str, Any]

MAX_ALTERNATIVES = 1_000
MAX_PARTS = 300  # of one conjunction, those within it included
MAX_NESTING = 20  # of oneOf in oneOf
NO_TYPE = "none"  # what is left of two types that exclude each other; an empty list would restrict nothing
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

_ANNOTATIONS = {
    "$schema", "$id", "id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "example", "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip


def refuse(where: str, what: str) -> UsageError:
    """The error for a part of a schema that a grammar cannot keep."""
    return UsageError(
        f"the JSON schema asks for what is not supported: {safe_line(what, 150)}", where=safe_line(where, 200)
    )


def _is_number(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return _is_number(value) and value >= 0 and value == int(value)


def _is_schema(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, dict | bool)


def _is_schemas(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_names(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_types(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    names = [value] if isinstance(value, str) else value
    return _is_names(names) and bool(names) and all(name in TYPES for name in names)


def _is_text(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, str)


KEYWORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "$ref": (_is_text, "a text"),
    "allOf": (_is_schemas, "a list of schemas"),
    "anyOf": (_is_schemas, "a list of schemas"),
    "oneOf": (_is_schemas, "a list of schemas"),
    "type": (_is_types, f"one or more of {', '.join(TYPES)}"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "const": (lambda _: True, "a value"),
    "properties": (
        lambda value: isinstance(value, dict) and all(map(_is_schema, value.values())),
        "an object of schemas",
    ),
    "required": (_is_names, "a list of names"),
    "additionalProperties": (_is_schema, "a schema"),
    "minProperties": (_is_count, "a count"),
    "maxProperties": (_is_count, "a count"),
    "items": (lambda value: _is_schema(value) or _is_schemas(value), "a schema"),
    "prefixItems": (_is_schemas, "a list of schemas"),
    "minItems": (_is_count, "a count"),
    "maxItems": (_is_count, "a count"),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    "minLength": (_is_count, "a count"),
    "maxLength": (_is_count, "a count"),
    "pattern": (_is_text, "a regular expression"),
    "format": (_is_text, "a name"),
    "minimum": (_is_number, "a number"),
    "maximum": (_is_number, "a number"),
    "exclusiveMinimum": (_is_number, "a number"),
    "exclusiveMaximum": (_is_number, "a number"),
    "multipleOf": (_is_number, "a number"),
}  # fmt: skip

_FAMILIES = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def natural_types(schema: Schema) -> list[str]:
    """The types that the keywords of an untyped schema speak of; others are valid too, but hardly meant."""
    return [name for name, keywords in _FAMILIES.items() if any(key in schema for key in keywords)]


class Flattener:
    """Makes schemas of one document flat: without `$ref`, `allOf`, `oneOf`, `const` and annotations."""

    def __init__(self, document: Any) -> None:  # noqa: ANN401 - any JSON value
        self._document = document
        self._depth = 0

    def flatten(self, schema: Any, where: str) -> Schema:  # noqa: ANN401 - any JSON value
        """The schema as one set of keywords. Raises UsageError: unknown keywords, wrong values, lost refs."""
        flat: Schema = {}
        todo: list[tuple[Any, str]] = [(schema, where)]
        references: set[str] = set()
        count = 0
        while todo:
            part, place = todo.pop(0)
            count += 1
            if count > MAX_PARTS:
                raise refuse(where, "a conjunction of so many schemas")
            if part is True:
                continue
            if part is False:
                part = {"enum": []}
            own = self._checked(part, place)
            reference = own.pop("$ref", None)
            # A reference met twice adds nothing; one that refers to itself neither.
            if reference is not None and reference not in references:
                references.add(reference)
                todo.append((self._resolve(reference, place), reference))
            todo += [(item, f"{place}/allOf/{i}") for i, item in enumerate(own.pop("allOf", ()))]
            flat = self._merge(flat, self._normal(own, part, place), place)
        return flat

    def _checked(self, schema: Any, where: str) -> Schema:  # noqa: ANN401 - any JSON value
        if not isinstance(schema, dict):
            raise UsageError("the JSON schema is malformed: a schema is an object", where=where)
        for key, value in schema.items():
            if key in _ANNOTATIONS:
                continue
            if key not in KEYWORDS:
                raise refuse(where, f"keyword {key}")
            check, takes = KEYWORDS[key]
            if not check(value):
                raise UsageError(
                    f"the JSON schema is malformed: {key} takes {takes}", where=safe_line(where, 200)
                )
        return {key: value for key, value in schema.items() if key not in _ANNOTATIONS}

    def _normal(self, own: Schema, schema: Schema, where: str) -> Schema:
        if isinstance(own.get("type"), str):
            own["type"] = [own["type"]]
        if "type" in own:
            own["type"] = sorted(set(own["type"]))
        if isinstance(own.get("items"), list):
            if "prefixItems" in own:
                raise refuse(where, "prefixItems beside a list of items")
            own["prefixItems"] = own.pop("items")
        if "const" in own:
            value = own.pop("const")
            own = self._merge(own, {"enum": [value]}, where)
        if "oneOf" in own:
            ways = self._apart(own.pop("oneOf"), schema.get("discriminator"), where)
            own = self._merge(own, {"anyOf": ways}, where)
        return own

    def _resolve(self, reference: str, where: str) -> Any:  # noqa: ANN401 - any JSON value
        if reference != "#" and not reference.startswith("#/"):
            raise refuse(where, f"$ref {reference}: only those within the schema are")
        target = self._document
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                raise UsageError(
                    f"the JSON schema has no {safe_line(reference, 150)}", where=safe_line(where, 200)
                )
        return target

    def _apart(self, ways: list[Any], discriminator: Any, where: str) -> list[Any]:  # noqa: ANN401 - any JSON value
        """The alternatives of a `oneOf`, of which no two have a value in common that would be generated."""
        if isinstance(discriminator, dict) and isinstance(discriminator.get("propertyName"), str):
            named = {"required": [discriminator["propertyName"]]}
            ways = [{"allOf": [way, named]} for way in ways]
        if self._depth >= MAX_NESTING or len(ways) > MAX_PARTS:
            raise refuse(where, "oneOf nested so deep, or of so many")
        self._depth += 1
        flat = [self.flatten(way, f"{where}/oneOf/{i}") for i, way in enumerate(ways)]
        self._depth -= 1
        for (i, some), (j, others) in itertools.combinations(enumerate(flat), 2):
            if not self._disjoint(some, others, where):
                raise UsageError(
                    f"the JSON schema's oneOf is ambiguous: a value may be valid under {i} and {j}",
                    where=safe_line(where, 200),
                    remedy="use anyOf, or a required property with another const in each",
                )
        return ways

    def _disjoint(self, some: Schema, others: Schema, where: str) -> bool:
        if "anyOf" in some or "anyOf" in others:
            return False
        if "enum" in some and "enum" in others:
            return not _common(some["enum"], others["enum"])
        types = [set(_types(schema)) for schema in (some, others)]
        types = [names | {"number"} if "integer" in names else names for names in types]
        shared = types[0] & types[1]
        if not shared:
            return True
        if shared != {"object"}:
            return False
        return self._distinguished(some, others, where) or (
            _never_valid(some, others) and _never_valid(others, some)
        )

    def _distinguished(self, some: Schema, others: Schema, where: str) -> bool:
        both = set(some.get("required", ())) & set(others.get("required", ()))
        for name in both & some.get("properties", {}).keys() & others.get("properties", {}).keys():
            place = f"{where}/properties/{name}"
            one, other = (self.flatten(schema["properties"][name], place) for schema in (some, others))
            if "enum" in one and "enum" in other and not _common(one["enum"], other["enum"]):
                return True
        return False

    def _merge(self, some: Schema, others: Schema, where: str) -> Schema:
        merged = dict(some)
        if all({"properties", "additionalProperties"} & side.keys() for side in (some, others)):
            merged["properties"] = _merged_properties(some, others)
        for key, value in others.items():
            if key not in merged:
                merged[key] = value
            elif merged[key] != value and key != "properties":
                if key not in _MERGE:
                    raise refuse(where, f"two different {key}")
                merged[key] = _MERGE[key](merged[key], value)
        if len(merged.get("anyOf", ())) > MAX_ALTERNATIVES:
            raise refuse(where, "so many alternatives at once")
        lists = [
            {key: side[key] for key in ("prefixItems", "items") if key in side} for side in (some, others)
        ]
        if "prefixItems" in merged and all(lists) and lists[0] != lists[1]:
            raise refuse(where, "prefixItems and items of different schemas")
        return merged


def _types(schema: Schema) -> list[str]:
    if "enum" in schema:
        return [_TYPE_NAMES[type(value)] for value in schema["enum"]]
    return schema.get("type") or natural_types(schema) or list(TYPES)


_TYPE_NAMES = {
    dict: "object",
    list: "array",
    str: "string",
    float: "number",
    int: "number",
    bool: "boolean",
    type(None): "null",
}


def _common(some: list[Any], others: list[Any]) -> list[Any]:
    return [value for value in some if any(_equal(value, other) for other in others)]


def _equal(value: Any, other: Any) -> bool:  # noqa: ANN401 - any JSON value
    # JSON knows 1 and 1.0 as one number, and neither as true.
    if _is_number(value) and _is_number(other):
        return bool(value == other)
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def _never_valid(some: Schema, others: Schema) -> bool:
    """Whether the objects generated for `some` are never valid under `others`."""
    if "additionalProperties" in some and some["additionalProperties"] is not False:
        return False
    known, demanded = set(some.get("properties", ())), set(some.get("required", ()))
    if not known and not demanded:
        return False
    if set(others.get("required", ())) - known - demanded:
        return True
    closed = others.get("additionalProperties") is False
    return closed and bool(demanded - set(others.get("properties", ())))


def _merged_properties(some: Schema, others: Schema) -> dict[str, Any]:
    """Each property under both schemas: where one does not name it, its `additionalProperties` counts."""
    sides = some, others
    names = list(dict.fromkeys(name for side in sides for name in side.get("properties", {})))
    merged: dict[str, Any] = {}
    for name in names:
        parts = [
            side.get("properties", {}).get(name, side.get("additionalProperties", True)) for side in sides
        ]
        merged[name] = _all_of(*parts)
    return merged


def _all_of(some: Any, others: Any) -> Any:  # noqa: ANN401 - any JSON value
    if some is False or others is False:
        return False
    if some is True or some == others:
        return others
    return some if others is True else {"allOf": [some, others]}


def _common_types(some: list[str], others: list[str]) -> list[str]:
    both = set(some) & set(others)
    for one, other in ((some, others), (others, some)):
        if "integer" in one and "number" in other:
            both.add("integer")
    return sorted(both) or [NO_TYPE]


_MERGE: dict[str, Callable[[Any, Any], Any]] = {
    "type": _common_types,
    "enum": _common,
    "anyOf": lambda some, others: [{"allOf": [a, b]} for a in some for b in others],
    "required": lambda some, others: list(dict.fromkeys([*some, *others])),
    "additionalProperties": _all_of,
    "items": _all_of,
    "uniqueItems": lambda some, others: some or others,
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
