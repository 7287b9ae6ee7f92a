"""A conversation as Markdown. What you wrote is quoted, replies are as the model wrote them.

A reply cannot swallow what follows it: a code block that it leaves open is closed. HTML in it stays as it is,
as in any Markdown; whoever shows the file decides about it.
"""

from __future__ import annotations

import re

from dsmoe_local.base.text import safe_file_line
from dsmoe_local.chat.export.about import About, body, remark
from dsmoe_local.chat.frames import in_fence
from dsmoe_local.chat.turns import Role, Transcript, Turn

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")
_PROBE = "end-of-the-reply"


def export_markdown(transcript: Transcript, about: About) -> str:
    """The whole conversation, with a heading for each turn."""
    parts = [f"# {_escaped(about.title)}", f"*{_escaped(about.facts(transcript))}*"]
    if transcript.system:
        parts += ["## System", _quoted(body(Turn(Role.USER, transcript.system)))]
    for turn in transcript.turns:
        parts.append(f"## {_escaped(about.speaker(turn))}")
        if text := body(turn):
            parts.append(_quoted(text) if turn.role is Role.USER else contained(text))
        if said := remark(turn):
            parts.append(f"*({said})*")
    return "\n\n".join(parts) + "\n"


def contained(text: str) -> str:
    """`text`, a Markdown document of its own, changed so that nothing in it reaches beyond its end."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark")

    def closed(document: str) -> bool:
        last = markdown.parse(f"{document}\n\n# {_PROBE}\n")[-2:]
        return [token.type for token in last] == ["inline", "heading_close"] and last[1].level == 0

    if closed(text):
        return text
    last = markdown.parse(text)[-1]
    ended = f"{text}\n{last.markup}"
    if last.type == "fence" and closed(ended):
        return ended
    return in_fence(text)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _escaped(text: str) -> str:
    """`text` on one line, as nothing but text."""
    return _PUNCTUATION.sub(r"\\\1", safe_file_line(text))
