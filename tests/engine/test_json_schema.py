"""JSON schemas as grammars: every text they permit is valid, as the package `jsonschema` sees it."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.grammar_texts import belongs, random_text
from support.grammar_texts import schema as compiled

from dsmoe_local.base.errors import UsageError


def assert_sound(schema: Any, seed: int, count: int = 8) -> int:
    """All random texts are valid; returns how many there were."""
    root = compiled(schema)
    rng = random.Random(seed)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    texts = [text for _ in range(count) if (text := random_text(root, rng)) is not None]
    for text in texts:
        value = json.loads(text.decode(), parse_constant=lambda name: pytest.fail(name))
        validator.validate(value)
    return len(texts)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": ["number", "null"]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[Any] = [
    {},
    True,
    PERSON,
    TREE,
    {"type": "object"},
    {"type": "array", "minItems": 2, "maxItems": 2},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "number", "minimum": -1.25, "exclusiveMaximum": 3},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 5},
    {"type": "number", "exclusiveMinimum": 99.5},
    {"type": "integer", "exclusiveMinimum": -12, "maximum": 1234567},
    {"type": "integer", "maximum": -7},
    {"enum": [1, "one", None, True, {"a": [1.5]}, 'q"\\\n']},
    {"const": {"x": "é\u2028"}},
    {"anyOf": [{"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, {"type": "null"}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "boolean"}}]},
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {"k": {"const": i}, f"v{i}": {"type": "integer"}},
                "required": ["k"],
            }
            for i in range(3)
        ]
    },
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, PERSON]}
    | {"allOf": [{"properties": {"a": {"type": "number"}}}, {"properties": {"a": {"maximum": 4}}}]},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "ab": {"type": "null"}, 'b"': {"type": "null"}},
        "additionalProperties": {"type": "string"},
    },
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {
        "type": "object",
        "properties": {"a": True},
        "required": ["a", "z"],
        "additionalProperties": {"type": "null"},
    },
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": {"type": "integer"}},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "maxItems": 1},
    {
        "type": "array",
        "prefixItems": [{"type": "null"}],
        "items": {"type": "integer"},
        "minItems": 3,
        "maxItems": 4,
    },
    {"properties": {"only": {"$ref": "#"}}},
    {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b", "c"]}},
        "required": ["kind"],
        "anyOf": [{"properties": {"kind": {"const": "b"}}}, {"properties": {"n": {"type": "null"}}}],
    },
    *({"type": "string", "format": name} for name in ("uuid", "ipv4", "hostname", "uri", "duration")),
    {"type": "integer", "multipleOf": 3, "minimum": 4, "maximum": 99},
    {"type": "object", "patternProperties": {"^n[0-9]$": {"type": "null"}}, "additionalProperties": False},
    {"type": "string", "pattern": "^a[b-d]*$", "minLength": 3, "maxLength": 5},
    {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "null"}},
    {"type": "integer", "x-note": "unknown keywords say nothing", "nullable": True},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:70])
def test_texts_are_valid(schema: Any) -> None:
    """Guards: a keyword that is dropped, a bound that is off by one, text that is not even JSON."""
    assert assert_sound(schema, seed=1, count=12) >= 6


_LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-(10**6), 10**6),
        st.integers(0, 10**7),
    ),
    st.builds(
        lambda low, size: {"type": "number", "minimum": low, "maximum": low + size},
        st.sampled_from([-3.75, -0.001, 0, 0.5, 7, 99.99]),
        st.sampled_from([0.25, 1, 10.5, 1000]),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    st.builds(
        lambda values: {"enum": values},
        # llguidance reads numbers as float64, as JavaScript does: integers beyond 2^53 are rounded.
        st.lists(st.text(max_size=6) | st.integers(-(2**53), 2**53), min_size=1, max_size=4),
    ),
    st.just({"type": ["string", "null"]}),
    st.just({}),
)
_KEYS = st.sampled_from(["a", "ab", "abc", "b", "", "é", 'q"', "x y", "~/"])


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda properties, required, extra: {
            "type": "object",
            "properties": properties,
            "required": sorted(required & properties.keys()),
            **extra,
        },
        st.dictionaries(_KEYS, inner, max_size=4),
        st.sets(_KEYS),
        st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}]),
    )


_TREES = st.recursive(
    _LEAVES,
    lambda inner: (
        _objects(inner)
        | st.builds(
            lambda item, low, size: {"type": "array", "items": item, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 3),
            st.integers(0, 3),
        )
        | st.builds(lambda ways: {"anyOf": ways}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda ways: {"allOf": ways}, st.lists(_objects(inner), min_size=2, max_size=2))
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("date", "2024-02-29", True),
        ("date", "2024-13-01", False),
        ("time", "23:59:59Z", True),
        ("time", "24:00:00Z", False),
        ("date-time", "2024-02-29T12:00:00+02:00", True),
        ("date-time", "2024-02-29 12:00", False),
        ("email", "a.b@example.org", True),
        ("email", "a b@example.org", False),
    ],
)
def test_formats(name: str, text: str, wanted: bool) -> None:
    """Guards: a format that is ignored. RFC 3339 has a year 0 and leap seconds: no random texts of these."""
    assert belongs(compiled({"type": "string", "format": name}), json.dumps(text)) == wanted


@given(_TREES, st.integers(0, 2**32))
@settings(max_examples=80)
def test_texts_of_random_schemas_are_valid(schema: Any, seed: int) -> None:
    """Guards: combinations of keywords that are each right alone."""
    try:
        n_texts = assert_sound(schema, seed, count=3)
    except UsageError as error:
        # Two random schemas may exclude each other, or hold what together is not supported.
        assume("Unsatisfiable" not in str(error))
        raise
    # A schema of which no text was found says nothing.
    assume(n_texts)


@given(
    st.integers(-(10**5), 10**5),
    st.integers(0, 10**5),
    st.integers(-(10**6), 10**6),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_integers_within_bounds_are_exactly_those(
    low: int, size: int, value: int, low_out: bool, high_out: bool
) -> None:
    """Guards: digits of a range that are split wrongly."""
    high = low + size
    schema = {
        "type": "integer",
        "exclusiveMinimum" if low_out else "minimum": low,
        "exclusiveMaximum" if high_out else "maximum": high,
    }
    first, last = low + low_out, high - high_out
    if first > last:
        with pytest.raises(UsageError, match="Unsatisfiable"):
            compiled(schema)
        return
    root = compiled(schema)
    for number in {value, first, last, first - 1, last + 1, (first + last) // 2, 0}:
        assert belongs(root, str(number)) == (first <= number <= last), number


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {},
            ["{}", "[1, [2]]", '"\\n"', "-1.5e+10", "null"],
            ["[1,]", "01", '"\n"', "{a:1}", "1.", "NaN", ""],
        ),
        ({"type": "string"}, ['"\\n\\"é"', '""'], ['"\\ud800"', "'a'", '"\\x"', '"a']),
        (
            PERSON,
            ['{"name": "A", "age": 0}', '{ "name":"A","age":130 }'],
            ['{"age":1,"name":"A"}', '{"name":"A"}'],
        ),
        ({"type": "number", "maximum": 2}, ["2", "1.75", "-3.5"], ["2.01", "3", "1e5"]),
        ({"type": "object", "properties": {"a": {}}}, ["{}", '{"a":[]}', '{"b":1}'], ['{"a":1,"a":2}']),
        (
            {"properties": {"a": {"type": "integer"}, "ab": {}}, "additionalProperties": {"type": "string"}},
            ['{"a":1,"b":"x"}', '{"abc":"x", "":"y", "A":"z"}', '{"ab":1}'],
            ['{"a":"x"}', '{"b":"x","a":"y"}', '{"b":"x","ab":"y"}', '{"b":1}'],
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": True, "maxProperties": 3, "required": ["a"]},
            ['{"a":1}', '{"a":1,"b":2}', '{"a":1,"b":2,"c":3}'],
            ["{}", '{"a":1,"b":2,"c":3,"d":4}'],
        ),
        ({"type": "string", "pattern": "a|^b$"}, ['"xay"', '"b"'], ['"xb"', '""']),
        ({"enum": ["a", 1]}, ['"a"', "1"], ["2", '"b"', "1.0"]),
    ],
)
def test_what_is_permitted(schema: Any, good: list[str], bad: list[str]) -> None:
    """Guards: grammars so narrow that they are sound for want of texts."""
    root = compiled(schema)
    assert [text for text in good if not belongs(root, text)] == []
    assert [text for text in bad if belongs(root, text)] == []


PATTERNS = [
    r"^[a-z0-9_-]{3,16}$",
    r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$",
    r"^\d+\.\d{2}$",
    r"^(?:foo|ba[rz])*?x+$",
    r"colou?r",
    r"^[a-z]+\s\W\D$",
    r"^[\w.+-]+@[\w-]+\.[\w.]+$",
    r"^[^a-y]$",
    r"^\u00e9\x41\/\-[\]\\^-]$",
    r"^.{2}$|^$",
    r"",
    r"^a{2,}b{0,3}c{2}$",
    r'^"[^"]*"$',
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_those_of_re(pattern: str) -> None:
    """Guards: characters that need an escape in JSON, anchors, classes read differently."""
    root = compiled({"type": "string", "pattern": pattern})
    rng = random.Random(0)
    for _ in range(40):
        text = random_text(root, rng, patience=20, limit=200)
        if text is not None:
            assert re.search(pattern, json.loads(text))
    alphabet = [*'abcfoxrz019 .-@_+()"\\é^]x']
    for _ in range(300):
        value = "".join(rng.choices(alphabet, k=rng.randrange(6)))
        if belongs(root, json.dumps(value, ensure_ascii=False)):
            assert re.search(pattern, value), value


@pytest.mark.parametrize(
    "pattern", [r"(?=a)b", r"(a)\1", r"\bword", "(a", "a)", "[a", "^a^", "a{3,2}", "*", "[z-a]"]
)
def test_patterns_that_are_refused(pattern: str) -> None:
    """Guards: syntax taken for something else, and so for something wrong."""
    with pytest.raises(UsageError, match="regex"):
        compiled({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"not": {"type": "null"}}, '"not"'),
        ({"if": {}, "then": {}}, '"if", "then"'),
        ({"propertyNames": {"pattern": "a"}}, '"propertyNames"'),
        ({"contains": {"type": "null"}}, '"contains"'),
        ({"dependentRequired": {"a": ["b"]}}, '"dependentRequired"'),
        ({"unevaluatedProperties": False}, '"unevaluatedProperties"'),
        ({"type": "string", "format": "smell"}, "smell"),
        ({"$ref": "https://example.com/s.json"}, "https://example.com/s.json"),
        ({"$ref": "#/$defs/lost"}, "/$defs/lost"),
        ({"type": "text"}, "Invalid type: text"),
        ({"properties": {"a/b": {"items": 3}}}, "must be an object or boolean"),
        ({"minLength": -1}, "minLength"),
        ({"enum": [1], "minimum": 3}, "Unsatisfiable"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "Unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
        ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
        (False, "is not an object"),
        ([], "is not an object"),
        (3, "is not an object"),
    ],
)
def test_schemas_that_are_refused(schema: Any, message: str) -> None:
    """Guards: keywords that are silently ignored, even at the schema's request; errors without a reason."""
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        compiled(schema)
    assert len(str(raised.value).splitlines()) <= 3
    assert "%json" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"type": "string"', "NaN", '{"minimum": 1e999}', '{"const": Infinity}', "[" * 100_000,
     '{"items":' * 20_000 + "{}" + "}" * 20_000, "\ud800", '{"maximum": ' + "9" * 10_000 + "}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_texts_that_are_no_schema(text: str) -> None:
    """Guards: Python's own errors, above all a recursion error, instead of one that says what is wrong."""
    with pytest.raises(UsageError, match="JSON schema"):
        compiled(text)


@pytest.mark.timeout(60)
def test_deep_recursive_and_wide_schemas() -> None:
    """Guards: Python's stack, sizes that double with every property, level or alternative."""
    deep: Any = {"type": "integer"}
    for _ in range(60):
        deep = {"type": "array", "items": deep, "minItems": 1, "maxItems": 2}
    assert belongs(compiled(deep), "[" * 60 + "7" + "]" * 60)
    wide = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(300)}}
    root = compiled(wide)
    assert belongs(root, json.dumps({"p7": 1, "p299": 2}))
    assert not belongs(root, json.dumps({"p299": 2, "p7": 1}))
    assert belongs(compiled(TREE), '{"value":1,"children":[' * 500 + '{"value":null}' + "]}" * 500)
    assert belongs(compiled({"anyOf": [{"$ref": "#"}, {"type": "null"}]}), "null")


@pytest.mark.timeout(60)
def test_conjunctions_that_explode_come_to_an_end() -> None:
    """Guards: a product of alternatives; references that double at each level, or never end."""
    ways = {"anyOf": [{"minLength": i} for i in range(12)]}
    more = [{"anyOf": [{"maxLength": i} for i in range(n, n + 12)]} for n in range(8)]
    doubling: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(40):
        doubling[f"d{i + 1}"] = {"allOf": [{"$ref": f"#/$defs/d{i}"}, {"allOf": [{"$ref": f"#/$defs/d{i}"}]}]}
    endless: dict[str, Any] = {"$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/a"}}}}}
    endless |= {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"x": {"$ref": "#"}}}]}
    for exploding in ({"allOf": [ways, *more]}, {"$defs": doubling, "$ref": "#/$defs/d40"}, endless):
        with suppress(UsageError):
            assert not belongs(compiled(exploding), '"x" ')


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = pydantic.Field(ge=0, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    name: str | None = None


class Owner(pydantic.BaseModel):
    """What users have: models of pydantic."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(min_length=1, max_length=20)
    pet: Cat | Dog = pydantic.Field(discriminator="kind")
    others: list[Cat | Dog] = pydantic.Field(default_factory=list, max_length=2)
    scores: dict[str, float] = {}
    pair: tuple[int, str]
    friend: Owner | None = None


def test_models_of_pydantic() -> None:
    """Guards: the schemas that most users have."""
    root = compiled(Owner.model_json_schema())
    rng = random.Random(3)
    texts = [text for _ in range(30) if (text := random_text(root, rng)) is not None]
    assert len(texts) > 10
    for text in texts:
        Owner.model_validate_json(text)
