"""How a file stands in a message, its name above its fenced text, and how to tell it from what was typed."""

from __future__ import annotations

import re
from pathlib import Path

from dsmoe_local.base.text import safe_line

LONGEST_NAME = 1024
_OPENING = re.compile(rf"([^\n]{{1,{LONGEST_NAME}}}):\n(`{{3,}})\w*(?=\n)")


def framed(name: str, text: str) -> str:
    """The text of a file called `name`, as the model reads it."""
    ending = Path(name).suffix.removeprefix(".")
    return f"{name}:\n{in_fence(text, ending if ending.isalnum() else '')}"


def in_fence(text: str, language: str = "") -> str:
    """`text` as a code block, in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"


def without_files(message: str) -> str:
    """What a person typed of a message, for previews: of the files in front of it only their names."""
    names: list[str] = []
    rest = message
    while (opening := _OPENING.match(rest)) is not None:
        # Longer than any run in the file's text.
        _, closing, behind = rest[opening.end() :].partition(f"\n{opening[2]}")
        if not closing or (behind and not behind.startswith("\n\n")):
            break
        names.append(f"[{opening[1]}]")
        rest = behind.removeprefix("\n\n")
    return " ".join([*names, rest.strip()]).strip() if names else message


def preview(message: str, limit: int) -> str:
    """The beginning of what a person typed, on one line of at most `limit` characters, safe to print."""
    return safe_line(without_files(message).strip(), limit)
