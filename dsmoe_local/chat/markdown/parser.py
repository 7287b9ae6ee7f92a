"""markdown-it-py set up for replies that are still being written, for a terminal.

Left out is what a stream cannot know in time (definitions of links further down) or a terminal cannot show
(HTML, entities): these stay as they were written. Added is what models write: tables, ~~deleted~~, emphasis
beside Chinese punctuation, mathematics, whose characters are no Markdown.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, paragraph
from markdown_it.rules_inline import StateInline, emphasis
from markdown_it.token import Token

_TOO_DEEP = 40
"""Levels of nesting; what is nested deeper is read as a paragraph. An item of a list takes two."""

_DEEPEST_BRACKETS = 20
_INDENTS = "indents"
_OUT = ("html_block", "reference"), ("html_inline", "entity")
_LINKS = ("link", "image")
_BRACKETS = re.compile(r"[\[\]]")
_MATHEMATICS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}


def parse_blocks(source: str) -> tuple[list[Token], dict[tuple[int, int], int]]:
    """The tokens of `source`, and by level and line how far the content of lists is indented there."""
    tokens: list[Token] = []
    indents: dict[tuple[int, int], int] = {}
    parser = _parser()
    if source:
        parser.block.parse(source, parser, {_INDENTS: indents}, tokens)
    return tokens, indents


def parse_inline(source: str) -> list[Token]:
    """The tokens of the text of a block."""
    parser = _parser(links=_bracket_depth(source) <= _DEEPEST_BRACKETS)
    return [child for token in parser.parseInline(source) for child in token.children or ()]


def _bracket_depth(source: str) -> int:
    """How many brackets are open at once: each may begin a link, and is looked behind for its end."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(source):
        depth = depth + 1 if bracket == "[" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


@cache
def _parser(*, links: bool = True) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 2 * _TOO_DEEP})
    parser.enable(["table", "strikethrough"])
    for names in (*_OUT, *(() if links else (_LINKS,))):
        parser.disable(list(names))
    parser.block.ruler.before("table", "observe", _observe)
    parser.inline.ruler.at("emphasis", _emphasis)
    parser.inline.ruler.before("escape", "mathematics", _mathematics)
    # Addresses are shown, never followed: as they were written, and with no opinion on them.
    parser.normalizeLink = str  # type: ignore[method-assign, assignment]
    parser.validateLink = bool  # type: ignore[method-assign, assignment]
    return parser


def _observe(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Note the indent, which tokens do not tell, and end the nesting before it eats the stack."""
    state.env[_INDENTS][state.level, start] = state.blkIndent
    return state.level >= _TOO_DEEP and paragraph(state, start, end, silent)


def _emphasis(state: StateInline, silent: bool) -> bool:
    """`**“引”**文` is meant as emphasis, but CommonMark wants a space between a mark that stands beside
    punctuation and the word on its other side, which Chinese and Japanese do not write.
    """
    known, start = len(state.delimiters), state.pos
    if not emphasis.tokenize(state, silent):
        return False
    before, after = state.src[start - 1 : start] or " ", state.src[state.pos : state.pos + 1] or " "
    if state.src[start] == "*":
        for delimiter in state.delimiters[known:]:
            delimiter.open |= _is_wide_letter(before) and not after.isspace()
            delimiter.close |= _is_wide_letter(after) and not before.isspace()
    return True


def _is_wide_letter(character: str) -> bool:
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WF"


def _mathematics(state: StateInline, silent: bool) -> bool:
    closes = _MATHEMATICS.get(state.src[state.pos : state.pos + 2])
    end = state.src.find(closes, state.pos + 2, state.posMax) if closes else -1
    if closes is None or end < 0:
        return False
    end += len(closes)
    if not silent:
        state.push("mathematics", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True
