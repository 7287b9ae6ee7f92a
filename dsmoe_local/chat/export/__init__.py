"""Exports a conversation in the format that the name of the file asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.export.formats import About, export_json, export_markdown
from dsmoe_local.chat.turns import Transcript


def _export_html(transcript: Transcript, about: About) -> str:
    # Imported here, since it needs large packages.
    from dsmoe_local.chat.export.html_page import export_html

    return export_html(transcript, about)


FORMATS: Mapping[str, Callable[[Transcript, About], str]] = {
    ".md": export_markdown,
    ".json": export_json,
    ".html": _export_html,
}
_ALIASES = {".markdown": ".md", ".htm": ".html"}


def export_as(name: str, transcript: Transcript, about: About) -> str:
    """Return a conversation in the format of a file called `name`. UsageError for an unknown ending."""
    ending = Path(name).suffix.lower()
    form = FORMATS.get(_ALIASES.get(ending, ending))
    if form is None:
        *others, last = FORMATS
        raise UsageError(
            f"{safe_line(name, 60)}: unknown format",
            remedy=f"a conversation can be exported to {', '.join(others)} or {last}",
        )
    return form(transcript, about)
