"""What the lines of an input contain: prompts, fields of a template, or requests."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import RequestError


@dataclass(frozen=True, slots=True)
class LineTemplate:
    """A prompt with fields. `pieces` are literal texts, each followed by a field's name or by None."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its fields."""
        return tuple(name for _, name in self.pieces if name is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt; values that are not text become JSON. RequestError if a field is missing."""
        parts = []
        for literal, name in self.pieces:
            parts.append(literal)
            if name is not None:
                if values.get(name) is None:
                    raise RequestError(
                        f"the template's field {safe_line(name, 40)!r} is missing", kind="missing_field"
                    )
                value = values[name]
                parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(parts)


def parse_template(text: str) -> LineTemplate:
    """Parse a template; `{{` and `}}` stand for braces. UsageError if it is malformed or has no field."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(
            f"the template is malformed: {error}", remedy="write {{ and }} for braces that are text"
        ) from error
    for _, name, form, conversion in parsed:
        if name is not None and (not name or form or conversion):
            raise UsageError(
                f"the template's field {safe_line(name or '{}', 40)!r} is not a plain name",
                remedy="write {name}, without : or !",
            )
    pieces = tuple((literal, name) for literal, name, _, _ in parsed)
    if all(name is None for _, name in pieces):
        raise UsageError("the template names no field", remedy="write {name} where a field's value belongs")
    return LineTemplate(text, pieces)


@dataclass(frozen=True, slots=True)
class InputForm:
    """What a line contains: a prompt (`text`), the fields of a `template`, or, with neither, a request.

    `chat` makes the prompts user messages. `id_field` names the field with a line's id (None: `id` or
    `custom_id`), `keep` the fields that are copied to its record.
    """

    text: bool = False
    template: LineTemplate | None = None
    chat: bool = False
    id_field: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chat and not (self.text or self.template):
            raise UsageError(
                "--chat is for --text and --template", remedy='without them, write {"messages": …} lines'
            )
        if self.text and (self.keep or self.id_field is not None):
            flag = "--keep" if self.keep else "--id-field"
            raise UsageError(f"{flag} is for lines with fields", remedy="leave out --text")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the options name: those of the template, then `keep` and `id_field`."""
        own = (*self.keep, *([self.id_field] if self.id_field is not None else []))
        return (*(self.template.fields if self.template else ()), *own)
