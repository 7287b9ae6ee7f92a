"""A conversation as one HTML page without scripts, images or external resources.

HTML in messages and replies is shown as text, links lead to web pages and mail addresses only, and a
Content-Security-Policy forbids the browser to load or run anything.
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
from dsmoe_local.chat.export.formats import About, body, reasoning, remark
from dsmoe_local.chat.turns import Role, Transcript, Turn

_SCHEMES = ("http:", "https:", "mailto:")
_MAX_HIGHLIGHTED = 200_000  # characters of one code block; lexers are slow
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


_LAYOUT = """
:root { color-scheme: light dark; --text: #1f2328; --quiet: #59636e; --back: #ffffff; --code: #f6f8fa;
  --line: #d1d9e0; --you: #eef4fb; --link: #0958c4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --quiet: #9198a1; --back: #0d1117; --code: #161b22; --line: #3d444d;
    --you: #14202e; --link: #6cb0ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 48rem; color: var(--text); background: var(--back);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
    "Microsoft YaHei", sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
header { border-bottom: 1px solid var(--line); margin-bottom: 1.5rem; }
header h1 { font-size: 1.5rem; line-height: 1.3; margin: .5rem 0; }
header p, footer, .remark { color: var(--quiet); font-size: .875rem; }
section { margin: 0 0 1.5rem; }
section > h2 { font-size: .875rem; color: var(--quiet); margin: 0 0 .25rem; }
section > div > :first-child { margin-top: 0; }
section > div > :last-child { margin-bottom: 0; }
.text { white-space: pre-wrap; background: var(--you); border-radius: .5rem; padding: .75rem 1rem; }
details { color: var(--quiet); margin: .25rem 0 .75rem; }
summary { cursor: pointer; font-size: .875rem; }
details .text { background: var(--code); margin-top: .5rem; font-size: .9375rem; }
.reply h1, .reply h2, .reply h3 { line-height: 1.3; font-size: 1.2rem; margin: 1.25rem 0 .5rem; }
.reply h1 { font-size: 1.35rem; }
.reply h4, .reply h5, .reply h6 { font-size: 1rem; margin: 1rem 0 .5rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono CJK SC", monospace;
  font-size: .875rem; }
code { background: var(--code); border-radius: .25rem; padding: .1em .3em; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  overflow-x: auto; line-height: 1.45; tab-size: 4; }
pre code { background: none; padding: 0; font-size: inherit; }
pre .err { border: 0; color: inherit; }
blockquote { margin: 1rem 0; padding: 0 1rem; border-left: .25rem solid var(--line); color: var(--quiet); }
hr { border: 0; border-top: 1px solid var(--line); margin: 1.5rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }
footer { border-top: 1px solid var(--line); margin-top: 2rem; }
@media print {
  body { max-width: none; }
  pre { white-space: pre-wrap; }
}
"""


def export_html(transcript: Transcript, about: About) -> str:
    """Return a conversation as an HTML page."""
    system = [_section("system", "System", _typed(transcript.system))] if transcript.system else []
    page = _PAGE.format(
        policy=_POLICY,
        version=html.escape(__version__),
        title=html.escape(about.title),
        facts=html.escape(about.facts(transcript)),
        style=_style_sheet(),
        sections="\n".join([*system, *(_turn(turn, about) for turn in transcript.turns)]),
    )
    # Needed although each part is safe: an entity in Markdown may have become a control character.
    return safe_file_text(page)


def _turn(turn: Turn, about: About) -> str:
    content = _typed(turn.content) if turn.role is Role.USER else _reply(body(turn))
    if thought := reasoning(turn):
        fold = f'<div class="text" dir="auto">{html.escape(thought)}</div>'
        content = f"<details>\n<summary>Reasoning</summary>\n{fold}\n</details>\n{content}"
    if said := remark(turn):
        content += f'\n<p class="remark">({html.escape(said)})</p>'
    return _section(turn.role, about.speaker(turn), content)


def _section(kind: str, speaker: str, content: str) -> str:
    return f'<section class="{kind}">\n<h2>{html.escape(speaker)}</h2>\n{content}\n</section>'


def _typed(text: str) -> str:
    # No newlines next to the tags: white space is shown here.
    return f'<div class="text" dir="auto">{html.escape(body(Turn(Role.USER, text)))}</div>'


def _reply(text: str) -> str:
    return f'<div class="reply" dir="auto">\n{_markdown().render(text)}</div>'


class _Markdown(MarkdownIt):
    """Markdown with links to web pages and mail addresses only; others are text."""

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
    """Render the description and URL of an image instead of it, since the page loads nothing."""
    token = tokens[index]
    description = renderer.renderInlineAsText(token.children or [], options, env)
    return html.escape(f"{description} ({token.attrGet('src')})")


def _link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    tokens[index].attrSet("rel", "nofollow noopener noreferrer")
    return renderer.renderToken(tokens, index, options, env)


def _highlighted(code: str, language: str, _: str) -> str:
    """Return highlighted code; empty if its language is unknown or it is too long."""
    if not language or len(code) > _MAX_HIGHLIGHTED:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    marked: str = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return marked if code.endswith("\n") else marked.removesuffix("\n")


def _style_sheet() -> str:
    """Return the CSS of the page: light and dark, on screen and on paper."""

    def colours(scheme: str, style: str) -> str:
        lines: list[str] = HtmlFormatter(style=style).get_token_style_defs("pre")  # type: ignore[no-untyped-call]
        rules = "\n".join(lines)
        return f"@media (prefers-color-scheme: {scheme}) {{\n{rules}\n}}"

    # The layout comes last, to override the red boxes around code that a lexer does not understand.
    return f"{colours('light', 'default')}\n{colours('dark', 'github-dark')}\n{_LAYOUT}"
