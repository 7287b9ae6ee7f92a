"""Markdown that is rendered while it arrives: finished blocks once, the open block whenever it changes.

Only whole lines are parsed, so the result does not depend on how the text is cut into pieces. Blocks, list
items and lines of code are finished one by one, unless they are nested in another block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy

from markdown_it.token import Token
from rich.text import Text

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.code import OpenCodeBlock, code_header, knows_language, language_of
from dsmoe_local.chat.markdown.parser import parse_blocks
from dsmoe_local.chat.markdown.render import Renderer
from dsmoe_local.chat.markdown.text import close_open_marks, fold_lines, to_ansi

_RETURN = safe_text("\r")
_GROWTH = 8  # an open block is parsed again when it has grown by 1/8, so that the total cost is linear
_MARKS = 80  # characters at the beginning of a line that may be the marks of lists and quotes
_FENCE = re.compile(" {0,3}(```|~~~)")
# The beginning of a line that may still become the mark of a block, or the end of a fence.
_PART_OF_MARK = re.compile(r"[\s>]*([-=*_+#~`|:\s]+|\d{1,9}[.)]?)?\s*")
_PART_OF_FENCE = re.compile(r"\s*(`+|~+)?")
_PROSE = ("paragraph_open", "heading_open")


def render_markdown(source: str, width: int, *, colour: bool) -> Text:
    """Return a whole text, rendered, without a newline at its end."""
    stream = MarkdownStream(colour=colour)
    return Text("\n").join([*stream.read(source, width), *stream.read_rest(width)])


class MarkdownStream:
    """Renders a reply while it is generated, as lines with ANSI styles.

    `after` is the source of a reply that this one continues. An open code block, table or list item is
    rendered again from its last line or its beginning, prose is not.
    """

    def __init__(self, *, colour: bool, after: str = "") -> None:
        self._colour = colour
        self._begin()
        self._strip = False  # spaces at the beginning of the next piece
        if after:
            self.read(after, 80)
            self._strip = self._is_prose()
            if self._strip:
                self._begin()
            self._renderer.above = None

    def _begin(self) -> None:
        self._rest: list[str] = []  # pieces of the line that is not complete
        self._lines: list[str] = []  # complete lines of blocks that are not finished
        self._n_unread = 0  # of these
        self._number: int | None = None  # of the first of them, if it is an item of a numbered list
        self._code: OpenCodeBlock | None = None  # the open code block; `_lines` is empty
        self._renderer = Renderer(self._colour)
        self._live: tuple[int, int, list[str]] | None = None

    def feed(self, piece: str, width: int) -> str:
        """Add more of the source. Return the lines that are finished, each with a newline."""
        if self._strip:
            # Spaces between the two replies would be an indentation here.
            piece = piece.lstrip()
            self._strip = not piece
        return self._printed(self.read(piece, width))

    def finish(self, width: int) -> str:
        """End the source. Return the remaining lines."""
        return self._printed(self.read_rest(width))

    def lines(self, width: int, height: int) -> list[str]:
        """Return the last `height` lines of the unfinished part, rendered.

        The cost depends on the size of the window, not on the length of the reply.
        """
        if self._live is None or self._live[:2] != (width, height):
            rendered = self._render_open(max(1, width), height) if height > 0 else []
            rows = [row for line in rendered for row in fold_lines(line, max(1, width))]
            self._live = width, height, [to_ansi(row, colour=self._colour) for row in rows[-height:]]
        return self._live[2]

    def read(self, piece: str, width: int) -> list[Text]:
        """Add more of the source. Return the lines that are finished."""
        first, *others = safe_text(piece).split("\n")
        self._rest.append(first)
        finished: list[Text] = []
        for other in others:
            finished += self._take("".join(self._rest).removesuffix(_RETURN), width)
            self._rest = [other]
        return finished

    def read_rest(self, width: int) -> list[Text]:
        """End the source. Return the remaining lines. The stream is then ready for another text."""
        rest = "".join(self._rest).removesuffix(_RETURN)
        finished = self._take(rest, width) if rest else []
        finished += self._code.take(final=True) if self._code else self._read(width, final=True)
        self._begin()
        return finished

    def _printed(self, lines: Iterable[Text]) -> str:
        self._live = None
        return "".join(f"{to_ansi(line, colour=self._colour)}\n" for line in lines)

    def _take(self, line: str, width: int) -> list[Text]:
        if self._code is not None:
            if not self._code.closed_by(line):
                self._code.add(line)
                return self._code.take()
            finished = self._code.take(final=True)
            self._code, self._renderer.above, self._renderer.blank = None, "fence", False
            return finished
        blank = not line.strip()
        if blank and not self._lines:
            self._renderer.blank = True
            return []
        self._lines.append(line)
        self._n_unread += 1
        if self._n_unread * _GROWTH < len(self._lines) and not (blank and self._ends_at_blank_line()):
            return []
        return self._read(width)

    def _ends_at_blank_line(self) -> bool:
        """Return whether a blank line ends the open block: it is neither a list nor indented code."""
        return not self._lines[0].startswith((" ", "\t", "-", "*", "+", *"0123456789"))

    def _read(self, width: int, *, final: bool = False) -> list[Text]:
        """Parse the open lines. Return the finished lines, rendered, and keep the rest."""
        self._n_unread = 0
        tokens = parse_blocks("".join(f"{line}\n" for line in self._lines))
        n_tokens, n_lines = (len(tokens), len(self._lines)) if final else _finished(tokens, len(self._lines))
        done, lines = tokens[:n_tokens], self._lines[:n_lines]
        finished = list(self._renderer.render(done, lines, width, number=self._number, fold=False))
        if n_tokens:
            self._number = _next_number(done, self._number) if tokens[n_tokens:] else None
        self._lines = self._lines[n_lines:]
        if not final and self._lines and tokens[n_tokens].type == "fence":
            finished += self._open_code_block(tokens[n_tokens])
        return finished

    def _open_code_block(self, token: Token) -> list[Text]:
        opening, *lines = self._lines
        self._lines = []
        language = language_of(token.info) if self._colour else ""
        indent = len(opening) - len(opening.lstrip(" "))
        self._code = OpenCodeBlock(token.markup, indent, language if knows_language(language) else "")
        for line in lines:
            self._code.add(line)
        gap = [Text()] if self._renderer.needs_gap(token.type) else []
        return [*gap, *code_header(token.info), *self._code.take()]

    def _render_open(self, width: int, height: int) -> list[Text]:
        rest = "".join(self._rest)
        if self._code is not None:
            return self._code.open_lines([] if _PART_OF_FENCE.fullmatch(rest) else [rest])
        lines = [*self._lines, *([] if _PART_OF_MARK.fullmatch(rest) else [rest])]
        lines = _last_lines(lines, width, height)
        tokens = parse_blocks("\n".join(lines))
        for token in reversed(tokens):
            if token.type == "inline":
                token.content = close_open_marks(token.content)
            if token.nesting >= 0:
                break
        return list(copy(self._renderer).render(tokens, lines, width, number=self._number, fold=True))

    def _is_prose(self) -> bool:
        """Return whether the open text can be continued without rendering it again."""
        if self._code is not None:
            return False
        rest = "".join(self._rest)
        tokens = parse_blocks("\n".join([*self._lines, rest]))
        return bool(tokens) and tokens[0].type in _PROSE and not _FENCE.match(rest)


def _finished(tokens: Sequence[Token], n_lines: int) -> tuple[int, int]:
    """Return how many tokens, and lines of source, belong to blocks that no further line can change."""
    everything = len(tokens), n_lines
    last = max(
        (index for index, token in enumerate(tokens) if not token.level and token.nesting >= 0), default=None
    )
    if last is None:
        return everything
    token = tokens[last]
    start, end = token.map or (0, 0)
    match token.type:
        case "heading_open" | "hr":
            return everything
        case "fence":
            closed = end - start - 1 > token.content.count("\n")
            return everything if closed else (last, start)
        case "bullet_list_open" | "ordered_list_open":
            *_, item = (i for i, t in enumerate(tokens) if t.type == "list_item_open" and t.level == 1)
            line = (tokens[item].map or [0])[0]
            return (last, start) if line == start else (item, line)
        case "code_block":
            return last, start
    return everything if end < n_lines else (last, start)


def _next_number(tokens: Sequence[Token], number: int | None) -> int | None:
    """Return the number of the next item if `tokens` end within a numbered list, otherwise None.

    `number` replaces the number of the first item.
    """
    last = max(index for index, token in enumerate(tokens) if not token.level)
    if tokens[last].type != "ordered_list_open":
        return None
    n_items = sum(token.type == "list_item_open" and token.level == 1 for token in tokens[last:])
    first = int(tokens[last].attrs.get("start", 1)) if last or number is None else number
    return first + n_items


def _last_lines(lines: list[str], width: int, height: int) -> list[str]:
    """Return the first lines, which determine the block's type, and enough last lines to fill the window."""
    if lines and lines[0].lstrip().startswith("|"):
        return [*lines[:2], *lines[2:][-height:]]
    kept, n_kept = len(lines), 0
    while kept > 1 and n_kept < width * height:
        kept -= 1
        n_kept += len(lines[kept]) + 1
    lines = [*lines[:1], *lines[max(1, kept) :]]
    if lines and len(lines[-1]) > width * height + _MARKS:
        lines[-1] = f"{lines[-1][:_MARKS]}…{lines[-1][-width * height :]}"
    return lines
