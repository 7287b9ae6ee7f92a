"""A stream of Markdown cut into blocks that are final. Draws nothing.

Lines are read when they are complete, so that it does not matter in which pieces the text comes. A stream
belongs to one thread; the blocks and the open parts that it gives away are for any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.blocks import Block, Kind
from dsmoe_local.chat.markdown.compose import Composer
from dsmoe_local.chat.markdown.inline import without_open_marks
from dsmoe_local.chat.markdown.leaves import Container, Context, Leaf, LeafKind, read_leaves

_RETURN = safe_text("\r")
_AT_ONCE = (LeafKind.HEADING, LeafKind.RULE)
_UNTIL_EMPTY_LINE = (LeafKind.PARAGRAPH, LeafKind.TABLE)
_PATIENCE = 8
"""An open block is read again when it has grown by this fraction: long ones cost no more than short ones."""

_MARK = re.compile(r"[\s>]*([-=*_+#~`|:\s]+|\d{1,9}[.)]?)?\s*")
"""A beginning of a line that may still become anything."""

_MARKS = 80
"""Characters that may be the marks of lists and quotes."""

_FENCE_MARK = re.compile(r"[\s>]*(`+|~+)?")


@dataclass(frozen=True, slots=True)
class Open:
    """What is not final yet; false where there is nothing."""

    lines: tuple[str, ...] = ()
    rest: str = ""
    context: Context = field(default_factory=Context)
    composer: Composer = field(default_factory=Composer)
    kind: LeafKind | None = None
    gap: bool | None = None

    def __bool__(self) -> bool:
        return bool(self.rest.strip() or any(map(str.strip, self.lines)))

    def blocks(self, n_characters: int) -> list[Block]:
        """The blocks as they would be if nothing more came, at least of the last `n_characters`."""
        if not self:
            return []
        mark = _FENCE_MARK if self.kind is LeafKind.FENCE else _MARK
        lines = [*self.lines, *(() if mark.fullmatch(self.rest) else (self.rest,))]
        head = 2 if self.kind is LeafKind.TABLE else 1
        kept, n_kept = len(lines), 0
        while kept > head and n_kept < n_characters:
            kept -= 1
            n_kept += len(lines[kept]) + 1
        lines[head:kept] = []
        if lines and len(lines[-1]) > n_characters + _MARKS:
            lines[-1] = f"{lines[-1][:_MARKS]}…{lines[-1][-n_characters:]}"
        leaves = read_leaves(lines, self.context)
        composer = self.composer.copy()
        blocks = [
            block
            for leaf, gap in zip(leaves, _gaps(leaves, lines, self.gap), strict=True)
            for block in composer.blocks(leaf, gap=gap)
        ]
        if blocks and blocks[-1].kind in (Kind.TEXT, Kind.HEADING):
            blocks[-1] = replace(blocks[-1], source=without_open_marks(blocks[-1].source))
        return blocks


class MarkdownStream:
    """Takes a reply as it comes, gives the blocks that became final, in order and each once."""

    def __init__(self, *, highlight: bool = True) -> None:
        self._highlight = highlight
        self._begin()

    def _begin(self) -> None:
        self._rest: list[str] = []  # pieces of the line that is not complete
        self._lines: list[str] = []  # complete ones that are not final
        self._n_unread = 0  # of these
        self._composer = Composer(self._highlight)
        self._context = Context()
        self._kind: LeafKind | None = None  # of the leaf that `_lines` begin with; None: they hold none
        self._gap: bool | None = None  # whether there is an empty line above that leaf

    def feed(self, text: str) -> list[Block]:
        """More of the source; returns what became final."""
        first, *others = safe_text(text).split("\n")
        self._rest.append(first)
        blocks: list[Block] = []
        for piece in others:
            blocks += self._take("".join(self._rest).removesuffix(_RETURN))
            self._rest = [piece]
        return blocks

    def finish(self) -> list[Block]:
        """The source is over; returns the rest of it. The stream is then as new."""
        if rest := "".join(self._rest).removesuffix(_RETURN):
            self._lines.append(rest)
        blocks = self._read(final=True)
        self._begin()
        return blocks

    @property
    def open(self) -> Open:
        """What is not final yet."""
        return Open(
            tuple(self._lines),
            "".join(self._rest),
            self._context,
            self._composer.copy(),
            self._kind,
            self._gap,
        )

    def _take(self, line: str) -> list[Block]:
        empty = _is_empty(line)
        if empty and self._kind in (None, LeafKind.EMPTY) and self._lines[-1:] == [line]:
            return []
        self._lines.append(line)
        self._n_unread += 1
        if self._n_unread * _PATIENCE < len(self._lines) and not (empty and self._kind in _UNTIL_EMPTY_LINE):
            return []
        return self._read()

    def _read(self, *, final: bool = False) -> list[Block]:
        """Read the open lines; keep of them what can still change."""
        self._n_unread = 0
        blocks: list[Block] = []
        leaves = read_leaves(self._lines, self._context)
        for leaf, gap in zip(leaves, _gaps(leaves, self._lines, self._gap), strict=True):
            if leaf is leaves[-1] and not final and not self._is_final(leaf):
                return blocks + self._keep(leaf, gap)
            blocks += self._composer.blocks(leaf, gap=gap)
        if leaves:
            path = _begun(leaves[-1].path)
            self._lines = self._lines[leaves[-1].end :]
            self._context, self._kind, self._gap = Context(path), None, None
        return blocks

    def _is_final(self, leaf: Leaf) -> bool:
        """Whether nothing can change the last leaf any more."""
        if leaf.kind in _UNTIL_EMPTY_LINE:
            return leaf.end < len(self._lines)
        return leaf.kind in _AT_ONCE or leaf.closed

    def _keep(self, leaf: Leaf, gap: bool) -> list[Block]:
        """Go on with a leaf that is open. The lines of code are final one by one."""
        blocks: list[Block] = []
        end = len(self._lines)
        if leaf.kind is LeafKind.FENCE and leaf.content:
            blocks = self._composer.blocks(leaf, gap=gap, more=True)
            leaf, end = replace(leaf, path=_begun(leaf.path)), leaf.start + 1
        self._lines = self._lines[leaf.start : end]
        self._context, self._kind, self._gap = Context.of(leaf), leaf.kind, gap
        return blocks


def _gaps(leaves: list[Leaf], lines: Sequence[str], first: bool | None) -> Iterator[bool]:
    """For each leaf, whether there is an empty line above it; of the first it may be known."""
    end = 0
    for leaf in leaves:
        if first is None:
            top = next((container.line for container in leaf.path if not container.begun), leaf.start)
            yield any(map(_is_empty, lines[end:top]))
        else:
            yield first
            first = None
        end = leaf.end


def _is_empty(line: str) -> bool:
    return not line.strip(" \t>")


def _begun(path: tuple[Container, ...]) -> tuple[Container, ...]:
    return tuple(replace(container, begun=True) for container in path)
