"""The line at the bottom: model, session, how full the context is, how fast the last reply came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prompt_toolkit.formatted_text import StyleAndTextTuples
from rich.cells import cell_len, set_cell_size

from dsmoe_local.base.text import safe_line

_CELLS = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SEPARATOR = "  ·  "
# Parts that are left out where the window is too narrow, the least needed first.
_LEAST_NEEDED = ("note", "speed", "session", "meter", "word", "model")


@dataclass(frozen=True, slots=True)
class Status:
    """What the bottom line tells; what is empty or 0 is left out."""

    model: str = ""
    session: str = ""
    n_used: int = 0
    n_context: int = 0
    tokens_per_second: float = 0.0
    note: str = ""


def bar(status: Status, columns: int) -> StyleAndTextTuples:
    """The line in `columns` cells, with the parts left out that do not fit."""
    parts = dict(_parts(status))
    for name in ("", *_LEAST_NEEDED):
        if name == "word":
            parts["context"] = parts.get("context", [])[-1:]
        parts.pop(name, None)
        if _width(parts) <= columns:
            break
    line: StyleAndTextTuples = []
    for text in parts.values():
        line += [("class:bar", _SEPARATOR)] if line else []
        line += text
    return line


def _parts(status: Status) -> Iterator[tuple[str, StyleAndTextTuples]]:
    if status.model:
        yield "model", [("class:bar.model", safe_line(status.model, 40))]
    if status.session:
        yield "session", [("class:bar", safe_line(status.session, 40))]
    if status.n_context:
        share = min(1.0, status.n_used / status.n_context)
        style = "class:bar.full" if share > 0.9 else "class:bar.filling" if share > 0.75 else "class:bar"
        yield "meter", [(style, _meter(share))]
        yield "context", [(style, "context "), (style, f"{status.n_used:,}/{status.n_context:,}")]
    if status.tokens_per_second >= 0.05:
        digits = 0 if status.tokens_per_second >= 10 else 1
        yield "speed", [("class:bar", f"{status.tokens_per_second:.{digits}f} tokens/s")]
    if status.note:
        yield "note", [("class:bar.note", safe_line(status.note, 60))]


def _meter(share: float) -> str:
    eighths = round(share * _CELLS * 8)
    full, rest = divmod(eighths, 8)
    return f"▕{('█' * full + (_EIGHTHS[rest] if rest else '')).ljust(_CELLS)}▏"


def _width(parts: dict[str, StyleAndTextTuples]) -> int:
    texts = [sum(cell_len(part[1]) for part in text) for text in parts.values()]
    return sum(texts) + len(_SEPARATOR) * max(0, len(texts) - 1)


def shorten(text: str, columns: int) -> str:
    """`text` in one line of at most `columns` cells."""
    line = safe_line(text, max(1, columns))
    return line if cell_len(line) <= columns else f"{set_cell_size(line, columns - 1).rstrip()}…"
