"""The style of an exported page: light and dark, wide and narrow, on paper. Loads nothing."""

from __future__ import annotations

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


def style_sheet() -> str:
    """The page's whole style, with the colours of highlighted code."""
    from pygments.formatters import HtmlFormatter

    def colours(scheme: str, style: str) -> str:
        lines: list[str] = HtmlFormatter(style=style).get_token_style_defs("pre")  # type: ignore[no-untyped-call]
        rules = "\n".join(lines)
        return f"@media (prefers-color-scheme: {scheme}) {{\n{rules}\n}}"

    # The page's own rules come last: code that a lexer does not understand gets no red boxes.
    return f"{colours('light', 'default')}\n{colours('dark', 'github-dark')}\n{_LAYOUT}"
