"""Read the chat templates of a checkpoint. They are copied as text; nothing is rendered here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from dsmoe_convert.errors import TokenizerError
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import is_encodable, safe_line
from dsmoe_local.model.config_json import load_json
from dsmoe_local.model.gguf_file import Field

_JINJA = "chat_template.jinja"
_JSON = "chat_template.json"
_KEY = "tokenizer.chat_template"
_MAX_BYTES = 1 << 20


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Field]:
    """Return the `tokenizer.chat_template` metadata: the default template and named ones, if there are any.

    chat_template.jinja takes precedence over chat_template.json, and both over tokenizer_config.json, as in
    transformers. Raises FileError, TokenizerError or FormatError.
    """
    found: object = config.get("chat_template")
    where = folder / "tokenizer_config.json"
    if (folder / _JSON).exists():
        where = folder / _JSON
        found = load_json(where, _MAX_BYTES).get("chat_template")
    if (folder / _JINJA).exists():
        where = folder / _JINJA
        found = _read_text(where)
    if found is None:
        return {}
    templates = (
        {"default": found} if not isinstance(found, list) else dict(_pair(item, where) for item in found)
    )
    for name, template in templates.items():
        if not isinstance(template, str) or len(template) > _MAX_BYTES or not is_encodable(template):
            raise TokenizerError(
                "the chat template is not text of at most 1 MiB",
                where=f"{where}: chat_template {safe_line(name, 40)}",
            )
    others = sorted(templates.keys() - {"default"})
    fields = {_KEY: templates["default"]} if "default" in templates else {}
    fields |= {f"{_KEY}.{name}": templates[name] for name in others}
    result = {key: Field(template, GGUFValueType.STRING) for key, template in fields.items()}
    if others:
        result["tokenizer.chat_templates"] = Field(others, GGUFValueType.ARRAY, GGUFValueType.STRING)
    return result


def _pair(item: object, where: Path) -> tuple[str, object]:
    """Return name and text of an entry of a list of templates. The name becomes part of a metadata key."""
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise TokenizerError("an entry of chat_template has no valid name", where=where)
    return name, item.get("template")


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError("the chat template exceeds 1 MiB", where=path)
        return path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"cannot read the chat template: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise TokenizerError("the chat template is not UTF-8", where=path) from error
