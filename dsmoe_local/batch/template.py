"""`--template`: a prompt with `{field}` in it, filled from a line's fields. Not a language: fields only."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.lines import LineError


@dataclass(frozen=True, slots=True)
class LineTemplate:
    """Pieces of text, each followed by a field's value or by nothing."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it names."""
        return tuple(name for _, name in self.pieces if name is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt: texts as they are, other values as JSON. LineError for a field that is missing."""
        parts = []
        for literal, name in self.pieces:
            parts.append(literal)
            if name is not None:
                if values.get(name) is None:
                    raise LineError(
                        f"the template's field {safe_line(name, 40)!r} is missing", kind="missing_field"
                    )
                value = values[name]
                parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(parts)


def parse_template(text: str) -> LineTemplate:
    """The template that `text` spells; `{{` and `}}` are braces. UsageError if it is none."""
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
