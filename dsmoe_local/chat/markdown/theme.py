"""The styles that Markdown is drawn in: few of the 16 colours and no backgrounds, so that it can be read on
dark and light terminals alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from rich.color import ColorSystem
from rich.style import Style

from dsmoe_local.chat.markdown.blocks import Span

# White, black, yellow and blue cannot be read on one of the two backgrounds.
_STYLES = {
    "emphasis": "italic",
    "strong": "bold",
    "deleted-text": "strike",
    "code": "cyan",
    "mathematics": "italic",
    "link": "underline",
    "address": "dim",
    "heading": "bold",
    "title": "bold underline",
    "header": "bold",
    "quote": "dim",
    "mark": "cyan",
    "rule": "dim",
    "comment": "dim italic",
    "keyword": "magenta",
    "type": "cyan",
    "definition": "bold",
    "string": "green",
    "number": "cyan",
    "deleted": "red",
}


def ansi(spans: Iterable[Span], *, colour: bool) -> str:
    """A line with its styles; without colours, bold and the like stay."""
    parts: list[list[str]] = []
    for names, text in spans:
        if parts and parts[-1][0] == names:
            parts[-1][1] += text
        elif text:
            parts.append([names, text])
    return "".join(
        style(names, colour=colour).render(text, color_system=ColorSystem.STANDARD) for names, text in parts
    )


@lru_cache(maxsize=512)
def style(names: str, *, colour: bool) -> Style:
    """The style that the names, separated by spaces, make together."""
    style = Style.combine([Style.null(), *(Style.parse(_STYLES[name]) for name in names.split())])
    return style if colour else style.without_color
