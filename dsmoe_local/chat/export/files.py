"""Which format a file's ending asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.export.about import About
from dsmoe_local.chat.export.html_page import export_html
from dsmoe_local.chat.export.json_file import export_json
from dsmoe_local.chat.export.markdown_file import export_markdown
from dsmoe_local.chat.turns import Transcript

FORMATS: Mapping[str, Callable[[Transcript, About], str]] = {
    ".md": export_markdown,
    ".json": export_json,
    ".html": export_html,
}
_SAME = {".markdown": ".md", ".htm": ".html"}


def export_as(name: str, transcript: Transcript, about: About) -> str:
    """The conversation in the format of a file called `name`. UsageError for an unknown ending."""
    ending = Path(name).suffix.lower()
    form = FORMATS.get(_SAME.get(ending, ending))
    if form is None:
        *others, last = FORMATS
        raise UsageError(
            f"{safe_line(name, 60)} has the ending of no format",
            remedy=f"a conversation is exported to a file that ends in {', '.join(others)} or {last}",
        )
    return form(transcript, about)
