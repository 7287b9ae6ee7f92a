"""JSON laid out for people while it is being generated. Checks nothing: what is no JSON passes through."""

from __future__ import annotations

_INDENT = "  "
_OPENS, _CLOSES = "{[", "}]"
_SPACES = " \t\r\n"


class IndentedJson:
    """Lays out the pieces of a JSON text: a member or element a line. The white space between tokens is ours,
    what is inside strings stays.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._after_opening = False  # whether nothing followed it yet: an empty object stays on its line

    def feed(self, piece: str) -> str:
        """What `piece` adds to the layout."""
        return "".join(map(self._lay_out, piece))

    def _lay_out(self, character: str) -> str:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
            return character
        if character in _SPACES:
            return ""
        empty, self._after_opening = self._after_opening, False
        if character in _CLOSES:
            self._depth = max(0, self._depth - 1)
            return character if empty else self._line() + character
        before = self._line() if empty else ""
        if character in _OPENS:
            self._depth += 1
            self._after_opening = True
        self._in_string = character == '"'
        after = {",": self._line(), ":": " "}.get(character, "")
        return before + character + after

    def _line(self) -> str:
        return "\n" + _INDENT * self._depth
