"""markdown-it-py, configured for the replies of language models on a terminal.

Disabled: link definitions, which may come after the text that uses them is printed, and HTML and entities,
which a terminal cannot show. Their source is shown as it is. Added: tables, ~~strikethrough~~, emphasis next
to Chinese punctuation, and mathematics, in which `*` and `_` are not Markdown.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, paragraph
from markdown_it.rules_inline import StateInline, emphasis
from markdown_it.token import Token

_MOST_LEVELS = 40  # of nesting; a list item takes two
_MOST_BRACKETS = 20  # open at once; the parser takes quadratic time to look for the ends of links
_BRACKETS = re.compile(r"[\[\]]")
_MATHEMATICS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}


def parse_blocks(source: str) -> list[Token]:
    """Return the block tokens of `source`. The content of inline tokens is not parsed."""
    tokens: list[Token] = []
    if source:
        parser = _parser()
        parser.block.parse(source, parser, {}, tokens)
    return tokens


def parse_inline(source: str) -> list[Token]:
    """Return the tokens of the text of one block."""
    parser = _parser(links=_bracket_depth(source) <= _MOST_BRACKETS)
    return [child for token in parser.parseInline(source) for child in token.children or ()]


def _bracket_depth(source: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKETS.findall(source):
        depth = depth + 1 if bracket == "[" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


@cache
def _parser(*, links: bool = True) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 2 * _MOST_LEVELS})
    parser.enable(["table", "strikethrough"])
    parser.disable(["html_block", "reference", "html_inline", "entity"])
    if not links:
        parser.disable(["link", "image"])
    parser.block.ruler.before("table", "deep_paragraph", _deep_paragraph)
    parser.inline.ruler.at("emphasis", _emphasis)
    parser.inline.ruler.before("escape", "mathematics", _mathematics)
    # URLs are shown and never opened, so they need neither encoding nor validation.
    parser.normalizeLink = str  # type: ignore[method-assign, assignment]
    parser.validateLink = bool  # type: ignore[method-assign, assignment]
    return parser


def _deep_paragraph(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Parse blocks that are nested too deeply as a paragraph. markdown-it-py would drop them."""
    return state.level >= _MOST_LEVELS and paragraph(state, start, end, silent)


def _emphasis(state: StateInline, silent: bool) -> bool:
    """Accept emphasis next to Chinese and Japanese letters.

    CommonMark does not close `**“引”**文`: after punctuation, it requires a space between the mark and the
    next word. These languages have no spaces.
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
