"""The one wording of what is wrong with a chat template."""

from __future__ import annotations

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import TemplateError


def template_error(source: str, reason: str) -> TemplateError:
    """The template from `source` cannot be used, for that reason."""
    return TemplateError(
        f"the chat template ({source}) fails: {safe_line(reason, 60)}",
        remedy="check the messages, or name another template with --chat-template",
    )
