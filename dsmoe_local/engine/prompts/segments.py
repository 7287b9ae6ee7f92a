"""Conversations as segments: the template's own text, and which stretch is which message's content.

Renders through a template that is given; knows neither jinja2 nor tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.types import Message


class Segment(NamedTuple):
    """A stretch of a rendered conversation.

    `message`: whose content it is; None for the template's own text.
    """

    text: str
    message: int | None = None


Segments: TypeAlias = list[Segment]


class Rendered(Protocol):
    """See `turns.Rendered`."""

    @property
    def text(self) -> str: ...

    @property
    def before(self) -> str: ...

    @property
    def checkpoint(self) -> Any: ...  # noqa: ANN401 - only handed back


class Template(Protocol):
    """See `sandbox.SandboxedTemplate`."""

    def render(self, messages: Sequence[dict[str, str]], *, generate: bool = True) -> str: ...

    def begin(self, messages: Sequence[dict[str, str]], after: Any = None) -> Rendered: ...  # noqa: ANN401


class Conversation:
    """Messages, each with a unique placeholder for its content that keeps the content's outer whitespace, so
    that a template may trim it.
    """

    def __init__(self, template: Template, messages: Sequence[Message]) -> None:
        self._template = template
        self._messages = messages
        self._cores = [message.content.strip() for message in messages]
        key = secrets.token_hex(8)
        self._placeholder = re.compile(rf"{key}\.(\d+)\.")
        self._real = [{"role": message.role, "content": message.content} for message in messages]
        self._masked = [
            {
                "role": message.role,
                "content": message.content.replace(core, f"{key}.{index}.", 1) if core else message.content,
            }
            for index, (message, core) in enumerate(zip(messages, self._cores, strict=True))
        ]

    def render(self, *, generate: bool = True) -> str:
        """As text."""
        return self._template.render(self._real, generate=generate)

    def segments(self, end: int | None = None, *, generate: bool = True) -> Segments | None:
        """The messages before `end`, told apart from the template's text. None if the template looks at the
        contents or changes them other than by trimming.
        """
        masked = self._template.render(self._masked[:end], generate=generate)
        return self._split(masked, self._template.render(self._real[:end], generate=generate))

    def stretches(self, replies: Sequence[int], *, open_end: bool) -> Iterator[Segments | None]:
        """What is read between replies: from the end of one to where the next begins, as it was rendered
        then. A template may end the prompt in `Assistant:` and repeat the same turn later as `Assistant: `.

        `replies` are the indices of those that are known by their ids. With `open_end` the last stretch leads
        to a reply that is yet to come. None, and no more, where the template does not allow it.
        """
        ends = [*replies, *([len(self._messages)] if open_end else [])]
        previous: int | None = None
        grown = _Grown()
        for end in ends:
            stretch = _behind(self._grow(grown, end), previous)
            if stretch is None:
                stretch = _behind(self.segments(end), previous)
            yield stretch
            if stretch is None:
                return
            previous = end

    def _grow(self, grown: _Grown, end: int) -> Segments | None:
        """The segments before `end`, from where those of a smaller `end` can be told to be the same; None
        if the template does not let that be told.
        """
        if grown.over:
            return None
        grown.over = True
        try:
            masked = self._template.begin(self._masked[:end], grown.masked)
            real = self._template.begin(self._real[:end], grown.real)
        except TemplateError:
            # Perhaps it needs a real list.
            return None
        grown.masked, grown.real = masked.checkpoint, real.checkpoint
        if self._split(masked.before, real.before) is None:
            return None
        if grown.masked is not None and grown.real is not None:
            so_far = self._split(masked.text[: grown.masked.position], real.text[: grown.real.position])
            grown.over = so_far is None
        return self._split(masked.text, real.text)

    def _split(self, masked: str, real: str) -> Segments | None:
        pieces = self._placeholder.split(masked)
        segments = [
            Segment(self._cores[int(piece)], int(piece)) if position % 2 else Segment(piece)
            for position, piece in enumerate(pieces)
        ]
        if "".join(segment.text for segment in segments) != real:
            return None
        return self._with_whitespace(segments)

    def _with_whitespace(self, segments: Segments) -> Segments:
        """Move a content's own outer whitespace, where the template kept it, from the template's text to the
        content.
        """
        texts = [segment.text for segment in segments]
        for position in range(1, len(segments), 2):
            content = self._messages[segments[position].message or 0].content
            lead = content[: len(content) - len(content.lstrip())]
            trail = content[len(content.rstrip()) :]
            before, after = texts[position - 1], texts[position + 1]
            if lead and before.endswith(lead):
                texts[position - 1], texts[position] = before[: -len(lead)], lead + texts[position]
            if trail and after.startswith(trail):
                texts[position + 1], texts[position] = after[len(trail) :], texts[position] + trail
        return [Segment(text, segment.message) for text, segment in zip(texts, segments, strict=True) if text]


@dataclass(slots=True)
class _Grown:
    """How far the beginning of a conversation is rendered, with and without placeholders; `over`: the next
    one cannot go on there.
    """

    masked: Any = None
    real: Any = None
    over: bool = False


def _behind(segments: Segments | None, reply: int | None) -> Segments | None:
    """Those behind the content of the message with that index; None without it."""
    if segments is None or reply is None:
        return segments
    ends = [position for position, segment in enumerate(segments) if segment.message == reply]
    return segments[ends[-1] + 1 :] if ends else None
