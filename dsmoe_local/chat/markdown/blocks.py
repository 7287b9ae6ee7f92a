"""The blocks that a reply is drawn from. Plain data: `stream` makes them, `render` draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Something that is drawn as it stands and never changes again."""

    content: str
    gap: bool = False
