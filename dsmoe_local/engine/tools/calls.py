"""Data of tool calls: the tools that a request offers, and the calls in messages and replies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
_MAX_REFERENCES = 8  # one after another


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments as text.

    None: the function has no parameters. If `strict`, a schema that cannot be enforced completely is refused.
    Otherwise keywords that cannot be enforced are ignored.
    """

    name: str
    description: str = ""
    parameters: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.parameters is not None and _object_of(self.parameters) is None:
            raise UsageError(
                f"the parameters of the tool {self.name} are not a JSON schema", remedy="write an object"
            )

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments."""
        none = {"type": "object", "properties": {}, "additionalProperties": False}
        return none if self.parameters is None else _object_of(self.parameters) or {}

    @property
    def properties(self) -> dict[str, Any]:
        """The schemas of the arguments by name, as far as they are listed at the top of the schema.

        References in place of such a schema are resolved.
        """
        schema = self.schema
        found = schema.get("properties")
        if not isinstance(found, dict):
            return {}
        return {name: _resolved(part, schema) for name, part in found.items()}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request, and how the reply may use them.

    - `required`: the reply consists of at least one call.
    - `only`: the reply is one call of the tool with this name.
    - `parallel`: the reply may contain several calls.
    """

    tools: tuple[Tool, ...]
    required: bool = False
    only: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two tools have the name {repeated}", remedy="rename one of them")
        if self.only is not None and self.only not in names:
            raise UsageError(
                f"there is no tool {safe_line(self.only, 40)!r} to choose", remedy="name one of the tools"
            )
        if not self.tools:
            raise UsageError("a call is required, but there are no tools", remedy="pass at least one")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in a message of the assistant. `arguments` is the text of a JSON object.

    The message of the role `tool` with the result has the same `id`.
    """

    id: str
    name: str
    arguments: str

    def __post_init__(self) -> None:
        _check_name(self.name)
        if _object_of(self.arguments) is None:
            raise UsageError(
                f"the arguments of the call of {self.name} are not a JSON object",
                remedy='write them as text, such as "{\\"city\\": \\"Paris\\"}"',
            )


class CallDelta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of a call in a reply. Calls are numbered by `index`, from 0.

    The first part of a call has its `id` and `name`, the others have neither. The arguments are the
    concatenation of all parts.
    """

    index: int
    arguments: str
    id: str = ""
    name: str = ""


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{safe_line(str(name), 40)!r} is not a name of a tool",
            remedy="use up to 128 letters, digits, and the characters _ - . :",
        )


def is_text(schema: object) -> bool:
    """Return True if all values that a schema permits are strings."""
    match schema:
        case {"type": "string" | ["string"]} | {"const": str()}:
            return True
        case {"enum": [*values]}:
            return all(isinstance(value, str) for value in values)
    return False


def may_be_text(schema: Mapping[str, Any]) -> bool:
    """Return True if a schema may permit strings. It need not be exact for unusual schemas."""
    ways = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(ways, list):
        return any(may_be_text(way) for way in ways if isinstance(way, dict))
    if "enum" in schema or "const" in schema:
        return is_text(schema)
    kinds = schema.get("type", "string" if "$ref" not in schema and "allOf" not in schema else "")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any part of a JSON text
    """Return the schema that a local reference leads to; `schema` itself if it is not one."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#/"):
            break
        target: Any = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        schema = target
    return schema


def _object_of(text: object) -> dict[str, Any] | None:
    """Return the JSON object that `text` contains; None if it is anything else."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
