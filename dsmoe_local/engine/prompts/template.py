"""Chat templates: rendering conversations with one. Knows no tokens.

Which one a model uses is `choice`'s concern; what a template may do, `sandbox`'s.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_local.engine.prompts.sandbox import SandboxedTemplate
from dsmoe_local.engine.types import Message


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered conversation.

    `message`: whose content it is; None for the template's own text.
    """

    text: str
    message: int | None = None


class ChatTemplate:
    """One template with the model's special texts bound. `source` says where it comes from."""

    def __init__(self, text: str, source: str, *, bos: str, eos: str) -> None:
        """Raises TemplateError if `text` is no template."""
        self.text = text
        self.source = source
        self._template = SandboxedTemplate(text, source, {"bos_token": bos, "eos_token": eos})

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The conversation as text; with `generate` it ends where the assistant's reply begins."""
        values = [{"role": message.role, "content": message.content} for message in messages]
        return self._template.render(messages=values, add_generation_prompt=generate)

    def segments(self, messages: Sequence[Message], *, generate: bool = True) -> list[Segment] | None:
        """`render` with the messages' contents told apart from the template's text.

        Each content is rendered as a unique placeholder that keeps the content's outer whitespace, so that a
        template may trim it. None if the template looks at the contents or changes them in another way.
        """
        key = secrets.token_hex(8)
        cores = [message.content.strip() for message in messages]
        masked = [
            Message(
                message.role, message.content.replace(core, f"{key}.{index}.", 1) if core else message.content
            )
            for index, (message, core) in enumerate(zip(messages, cores, strict=True))
        ]
        pieces = re.split(rf"{key}\.(\d+)\.", self.render(masked, generate=generate))
        segments = [
            Segment(cores[int(piece)], int(piece)) if position % 2 else Segment(piece)
            for position, piece in enumerate(pieces)
        ]
        if "".join(segment.text for segment in segments) != self.render(messages, generate=generate):
            return None
        return _with_whitespace(segments, messages)


def _with_whitespace(segments: list[Segment], messages: Sequence[Message]) -> list[Segment]:
    """Move a content's own outer whitespace, where the template kept it, from the template's text to the
    content.
    """
    texts = [segment.text for segment in segments]
    for position in range(1, len(segments), 2):
        content = messages[segments[position].message or 0].content
        lead = content[: len(content) - len(content.lstrip())]
        trail = content[len(content.rstrip()) :]
        before, after = texts[position - 1], texts[position + 1]
        if lead and before.endswith(lead):
            texts[position - 1], texts[position] = before[: -len(lead)], lead + texts[position]
        if trail and after.startswith(trail):
            texts[position + 1], texts[position] = after[len(trail) :], texts[position] + trail
    return [Segment(text, segment.message) for text, segment in zip(texts, segments, strict=True) if text]
