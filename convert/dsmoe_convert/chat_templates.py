"""Read the chat templates of a checkpoint. They are copied as text; nothing is rendered here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from dsmoe_convert.errors import TokenizerError
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import is_encodable, safe_line
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.json_object import load_json

DEFAULT = "default"
FOLDER = "additional_chat_templates"
_JINJA = "chat_template.jinja"
_JSON = "chat_template.json"
_KEY = "tokenizer.chat_template"
_MAX_BYTES = 1 << 20
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_]")


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name. The one that is used unless another is named is "default".

    chat_template.jinja takes precedence over chat_template.json, and both over tokenizer_config.json, as in
    transformers. Files in additional_chat_templates are added. Raises FileError, TokenizerError or
    FormatError.
    """
    found: object = config.get("chat_template")
    where = folder / "tokenizer_config.json"
    if (folder / _JSON).exists():
        where = folder / _JSON
        found = load_json(where, _MAX_BYTES).get("chat_template")
    if (folder / _JINJA).exists():
        where = folder / _JINJA
        found = _read_text(where)
    listed = found if isinstance(found, list) else [] if found is None else [_entry(DEFAULT, found)]
    more = [_entry(path.stem, _read_text(path)) for path in sorted((folder / FOLDER).glob("*.jinja"))]
    templates: dict[str, str] = {}
    for entry in (*listed, *more):
        name = entry.get("name") if isinstance(entry, dict) else None
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise TokenizerError("a chat template has no name", where=where)
        if not isinstance(template, str) or len(template) > _MAX_BYTES or not is_encodable(template):
            raise TokenizerError(
                "the chat template is not text of at most 1 MiB",
                where=f"{where}: chat_template {safe_line(name, 40)}",
            )
        # The name becomes part of a metadata key.
        templates[_NOT_IN_KEYS.sub("_", name)] = template
    return templates


def fields(templates: Mapping[str, str]) -> dict[str, Field]:
    """Return the templates as GGUF metadata."""
    others = sorted(templates.keys() - {DEFAULT})
    result = {f"{_KEY}.{name}": Field(templates[name], GGUFValueType.STRING) for name in others}
    if DEFAULT in templates:
        result = {_KEY: Field(templates[DEFAULT], GGUFValueType.STRING)} | result
    if others:
        result["tokenizer.chat_templates"] = Field(others, GGUFValueType.ARRAY, GGUFValueType.STRING)
    return result


def _entry(name: str, template: object) -> dict[str, object]:
    return {"name": name, "template": template}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError("the chat template exceeds 1 MiB", where=path)
        return path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"cannot read the chat template: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise TokenizerError("the chat template is not UTF-8", where=path) from error
