"""Styled text: inline Markdown, line breaks, ANSI codes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.cells import most_cells
from dsmoe_local.chat.markdown.parser import parse_inline

# No backgrounds, and none of white, black, yellow and blue: readable on light and dark terminals alike.
PLAIN = Style.null()
_CODE, _LINK, _URL = Style(color="cyan"), Style(underline=True), Style(dim=True)
_INLINE = {
    "em": Style(italic=True),
    "strong": Style(bold=True),
    "s": Style(strike=True),
    "a": _LINK,
    "code_inline": _CODE,
    "mathematics": Style(italic=True),
}
_CONSOLE = Console(file=io.StringIO(), width=80, color_system=None)  # not written to
_LONGEST_PART = 5000  # characters that are parsed at once
_TAB_SIZE = 4

# A newline within a sentence, from a source that was wrapped at some width.
_SOFT_WRAP = re.compile(r"(?<=[^\n]{50})(?<!  )(?<!\\)\n(?=[a-z])")
_BACKTICKS = re.compile("`+")
_CODE_SPAN = re.compile("(`+).*?\\1", re.DOTALL)

# Chinese and Japanese, unlike Korean, are written without spaces: a line may end after each character.
_WIDE = (
    "\u2e80-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
    "\u231a-\u23ff\u2600-\u27bf\U0001f300-\U0001faff"
)
_MODIFIERS = "\u0300-\u036f\u20d0-\u20ff\ufe00-\ufe0f\U0001f3fb-\U0001f3ff"
_NOT_FIRST = re.escape(
    "，。、；：？！）】》」』〉〕〗”’…—～·％,.;:?!)]}%々ーぁぃぅぇぉっゃゅょァィゥェォッャュョ"
)
_NOT_LAST = re.escape("（【《「『〈〔〖“‘([{")
_BREAK = re.compile(
    "(?<= )(?! )"
    f"|(?<![ \u200d{_NOT_LAST}])(?:(?<=[{_WIDE}])|(?=[{_WIDE}]))(?![ \u200d{_NOT_FIRST}{_MODIFIERS}])"
    "|$"
)
_CLUSTER = re.compile(f"[\U0001f1e6-\U0001f1ff]{{2}}|.[{_MODIFIERS}]*(?:\u200d.[{_MODIFIERS}]*)*", re.DOTALL)


def inline_text(source: str, style: Style = PLAIN) -> Text:
    """Return the text of a block. Lines end where those of the source do, except within a sentence that was
    wrapped. The URL of a link follows its text, unless they are the same.
    """
    text = Text()
    source = _SOFT_WRAP.sub(" ", source)
    while source:
        part = source
        if len(part) > _LONGEST_PART:
            part = source[: max(source.rfind(mark, 0, _LONGEST_PART) for mark in "\n ") + 1 or _LONGEST_PART]
        source = source[len(part) :]
        _append_inline(text, part, style)
    return text


def _append_inline(text: Text, source: str, base: Style) -> None:
    styles, starts = [base], []
    for token in parse_inline(source):
        if token.type == "image":
            text.append(safe_text(token.content), styles[-1] + _LINK)
            text.append(
                _url(token.content, token.attrs.get("src"), token.attrs.get("title")), styles[-1] + _URL
            )
        elif token.nesting > 0:
            styles.append(styles[-1] + _INLINE[token.tag])
            starts.append((len(text), token))
        elif token.nesting < 0:
            styles.pop()
            start, opening = starts.pop()
            if token.tag == "a":
                shown = _url(text.plain[start:], opening.attrs.get("href"), opening.attrs.get("title"))
                text.append(shown, styles[-1] + _URL)
        elif token.tag == "br":
            text.append("\n")
        else:
            text.append(safe_text(token.content), styles[-1] + _INLINE.get(token.type, PLAIN))


def _url(shown: str, url: object, title: object) -> str:
    """Return what follows the text of a link."""
    address = safe_text(str(url or ""))
    same = shown.strip() in (address, address.removeprefix("mailto:"), address.partition("//")[2])
    parts = ["" if same else address, f'"{safe_text(str(title))}"' if title else ""]
    return f" ({' '.join(filter(None, parts))})" if any(parts) else ""


def close_open_marks(source: str) -> str:
    """Close the emphasis and code that `source`, which is still being written, leaves open."""
    source = source.rstrip("*_~`")
    marks = ""
    for run in _BACKTICKS.findall(source):
        if not marks or run == marks:
            marks = "" if marks else run
    if marks:
        return source + marks
    prose = _CODE_SPAN.sub("", source)
    return source + "".join(mark for mark in ("~~", "**") if prose.count(mark) % 2)


def wrap(text: Text, width: int, *, fold: bool) -> list[Text]:
    """Return `text` in lines of at most `width` cells, broken at spaces and between wide characters.

    A longer word has a line of its own, which is too long: the terminal wraps it, so that a URL can be
    copied as a whole. With `fold` it is broken.
    """
    lines: list[Text] = []
    for line in _source_lines(text):
        offsets: list[int] = []
        start = end = 0
        for match in _BREAK.finditer(line.plain):
            word, end = end, match.start()
            if word > start and most_cells(line.plain[start:end].rstrip(" ")) > width:
                offsets.append(word)
                start = word
        for part in line.divide(offsets):
            part.rstrip()
            lines += _fold_line(part, width) if fold else [part]
    return lines


def fold_lines(text: Text, width: int) -> list[Text]:
    """Return `text` in lines of at most `width` cells, broken after any character, as a terminal does."""
    return [part for line in _source_lines(text) for part in _fold_line(line, width)]


def _source_lines(text: Text) -> Iterator[Text]:
    text.expand_tabs(_TAB_SIZE)
    return iter(text.split("\n", allow_blank=True))


def _fold_line(line: Text, width: int) -> list[Text]:
    if most_cells(line.plain) <= width:
        return [line]
    offsets, used = [], 0
    for match in _CLUSTER.finditer(line.plain):
        taken = most_cells(match[0])
        if used and used + taken > width:
            offsets.append(match.start())
            used = 0
        used += taken
    return list(line.divide(offsets))


def to_ansi(line: Text, *, colour: bool) -> str:
    """Return a line with ANSI codes. Without `colour`, bold and other attributes stay."""
    parts = []
    for text, style, _ in line.render(_CONSOLE):
        look = style if style is None or colour else style.without_color
        parts.append(text if look is None else look.render(text, color_system=ColorSystem.STANDARD))
    return "".join(parts)
