"""The text of a block as styled spans: emphasis, code, links, mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from markdown_it.token import Token

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.blocks import Span, Spans
from dsmoe_local.chat.markdown.parser import parse_inline

_STYLES = {"em": "emphasis", "strong": "strong", "s": "deleted-text"}
_LONGEST = 5000
_BROKEN = re.compile(r"(?<=[^\n]{50})(?<!  )(?<!\\)\n(?=[a-z])")
_BACKTICKS = re.compile("`+")
_CODE = re.compile("(`+).*?\\1", re.DOTALL)
_TEXT = {"text": "", "text_special": "", "code_inline": "code", "mathematics": "mathematics"}


@lru_cache(maxsize=256)
def inline_spans(source: str, base: str = "") -> Spans:
    """The spans of `source`, all in the style `base` and their own. Lines end where the source's do, but for
    those that were broken in the middle of a sentence to fit somebody else's window.
    """
    source = _BROKEN.sub(" ", source)
    return tuple(
        (style, safe_text(text))
        for part in _parts(source)
        for style, text in _spans(parse_inline(part), base)
        if text
    )


def without_open_marks(source: str) -> str:
    """Text that is still being written, so that emphasis and code look right before their end is there."""
    source = source.rstrip("*_~`")
    marks = ""
    for run in _BACKTICKS.findall(source):
        if not marks or run == marks:
            marks = "" if marks else run
    if marks:
        return source + marks
    prose = _CODE.sub("", source)
    return source + "".join(mark for mark in ("~~", "**") if prose.count(mark) % 2)


def _parts(source: str) -> Iterator[str]:
    """Parts that can be read in a moment, whatever they are."""
    while len(source) > _LONGEST:
        end = max(source.rfind(mark, 0, _LONGEST) for mark in "\n ") + 1 or _LONGEST
        yield source[:end]
        source = source[end:]
    yield source


def _spans(tokens: list[Token], base: str) -> Iterator[Span]:
    styles = [base]
    links: list[tuple[Token, list[str]]] = []
    for token in tokens:
        if token.type in _TEXT:
            for _, texts in links:
                texts.append(token.content)
            yield f"{styles[-1]} {_TEXT[token.type]}".strip(), token.content
        elif token.type in ("softbreak", "hardbreak"):
            yield styles[-1], "\n"
        elif token.type == "image":
            yield from _spans(token.children or [], f"{styles[-1]} link".strip())
            yield _address(token, token.content, "src", styles[-1])
        elif token.nesting > 0:
            if token.type == "link_open":
                links.append((token, []))
            styles.append(f"{styles[-1]} {_STYLES.get(token.tag, 'link')}".strip())
        elif token.nesting < 0:
            styles.pop()
            if token.type == "link_close":
                link, texts = links.pop()
                yield _address(link, "".join(texts), "href", styles[-1])


def _address(token: Token, text: str, attribute: str, base: str) -> Span:
    """Where a link leads, unless its text says it."""
    address, title = str(token.attrGet(attribute) or ""), str(token.attrGet("title") or "")
    known = text.strip() in (address, address.removeprefix("mailto:"), address.partition("//")[2])
    parts = [*(() if known else (address,)), *((f'"{title}"',) if title else ())]
    return f"{base} address".strip(), f" ({' '.join(filter(None, parts))})" if any(parts) else ""
