"""A conversation as one page of HTML that needs nothing else: no script, no picture, nothing from elsewhere.

All text is foreign: HTML in it is shown as text, links lead to web pages and mail only, and the page itself
forbids the browser to load or run anything.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from dsmoe_local import __version__
from dsmoe_local.base.text import safe_file_text
from dsmoe_local.chat.export.about import About, body, remark
from dsmoe_local.chat.export.html_style import style_sheet
from dsmoe_local.chat.turns import Role, Transcript, Turn

_SCHEMES = ("http:", "https:", "mailto:")
_MAX_HIGHLIGHTED = 200_000  # characters of one code block: lexers are regular expressions
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="dsmoe-local {version}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1 dir="auto">{title}</h1>
<p>{facts}</p>
</header>
<main>
{sections}
</main>
<footer><p>dsmoe-local {version}</p></footer>
</body>
</html>
"""


def export_html(transcript: Transcript, about: About) -> str:
    """The whole conversation as a page."""
    system = [_section("system", "System", _typed(transcript.system))] if transcript.system else []
    page = _PAGE.format(
        policy=_POLICY,
        version=html.escape(__version__),
        title=html.escape(about.title),
        facts=html.escape(about.facts(transcript)),
        style=style_sheet(),
        sections="\n".join([*system, *(_turn(turn, about) for turn in transcript.turns)]),
    )
    # Once more: an entity in Markdown may have become a control character.
    return safe_file_text(page)


def _turn(turn: Turn, about: About) -> str:
    content = _typed(turn.content) if turn.role is Role.USER else _reply(body(turn))
    if said := remark(turn):
        content += f'\n<p class="remark">({html.escape(said)})</p>'
    return _section(turn.role, about.speaker(turn), content)


def _section(kind: str, speaker: str, content: str) -> str:
    return f'<section class="{kind}">\n<h2>{html.escape(speaker)}</h2>\n{content}\n</section>'


def _typed(text: str) -> str:
    # On one line with its tags: white space counts here.
    return f'<div class="text" dir="auto">{html.escape(body(Turn(Role.USER, text)))}</div>'


def _reply(text: str) -> str:
    return f'<div class="reply" dir="auto">\n{_markdown().render(text)}</div>'


class _Markdown(MarkdownIt):
    """Markdown in which a link is to a web page or for mail; any other stays text."""

    def validateLink(self, url: str) -> bool:  # noqa: N802 - the parser's name
        return url.lower().startswith(_SCHEMES)


@cache
def _markdown() -> MarkdownIt:
    markdown = _Markdown("commonmark", {"html": False, "highlight": _highlighted})
    markdown.enable(["table", "strikethrough"])
    markdown.add_render_rule("image", _image)
    markdown.add_render_rule("link_open", _link)
    markdown.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return markdown


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """A picture would be loaded from elsewhere: its description and address are shown instead."""
    token = tokens[index]
    description = renderer.renderInlineAsText(token.children or [], options, env)
    return html.escape(f"{description} ({token.attrGet('src')})")


def _link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    tokens[index].attrSet("rel", "nofollow noopener noreferrer")
    return renderer.renderToken(tokens, index, options, env)


def _highlighted(code: str, language: str, _: str) -> str:
    """`code` with its words marked; empty if that cannot be done."""
    if not language or len(code) > _MAX_HIGHLIGHTED:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    marked: str = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return marked if code.endswith("\n") else marked.removesuffix("\n")
