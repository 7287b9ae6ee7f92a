"""Splits a rendered conversation into the template's own text and the contents of messages."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.types import Message


class Segment(NamedTuple):
    """A part of a rendered conversation.

    It is the content of the message with the index `message`, or the template's own text if that is None.
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
    def checkpoint(self) -> Any: ...  # noqa: ANN401 - opaque, only passed back to `begin`


class Template(Protocol):
    """See `sandbox.SandboxedTemplate`."""

    def render(self, messages: Sequence[dict[str, str]], *, generate: bool = True) -> str: ...

    def begin(self, messages: Sequence[dict[str, str]], after: Any = None) -> Rendered: ...  # noqa: ANN401


class Conversation:
    """A conversation to render. To find the contents, it is rendered a second time with placeholders.

    The whitespace around a content stays around its placeholder, so that templates may trim it.
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
        """Return the conversation as text."""
        return self._template.render(self._real, generate=generate)

    def segments(self, end: int | None = None, *, generate: bool = True) -> Segments | None:
        """Return the segments of the messages before `end`.

        Returns None if the template depends on the contents, or changes them other than by trimming.
        """
        masked = self._template.render(self._masked[:end], generate=generate)
        return self._split(masked, self._template.render(self._real[:end], generate=generate))

    def stretches(self, replies: Sequence[int], *, open_end: bool) -> Iterator[Segments | None]:
        """Yield the stretches of segments between the end of one reply and the start of the next.

        Each is rendered as the end of a prompt, as when the next reply was generated: a template may end a
        prompt with `Assistant:` but later render the same turn as `Assistant: `. `replies` are the indices of
        the messages whose token ids are known. With `open_end`, the last stretch ends where a new reply
        begins. Yields None and stops if the template does not permit the split.
        """
        ends = [*replies, *([len(self._messages)] if open_end else [])]
        previous: int | None = None
        progress = _Progress()
        for end in ends:
            stretch = _after(self._extend(progress, end), previous)
            if stretch is None:
                stretch = _after(self.segments(end), previous)
            yield stretch
            if stretch is None:
                return
            previous = end

    def _extend(self, progress: _Progress, end: int) -> Segments | None:
        """Return the segments before `end`, continuing from the checkpoints of the previous prefix.

        Returns None if the template does not permit that.
        """
        if progress.failed:
            return None
        progress.failed = True
        try:
            masked = self._template.begin(self._masked[:end], progress.masked)
            real = self._template.begin(self._real[:end], progress.real)
        except TemplateError:
            # The template may need a real list, which `segments` passes.
            return None
        progress.masked, progress.real = masked.checkpoint, real.checkpoint
        if self._split(masked.before, real.before) is None:
            return None
        if progress.masked is not None and progress.real is not None:
            so_far = self._split(masked.text[: progress.masked.position], real.text[: progress.real.position])
            progress.failed = so_far is None
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
        """Move the whitespace of contents from the template's text to the segments of the contents."""
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
class _Progress:
    """The checkpoints of the last prefix, with and without placeholders.

    If `failed`, later prefixes cannot continue from them.
    """

    masked: Any = None
    real: Any = None
    failed: bool = False


def _after(segments: Segments | None, reply: int | None) -> Segments | None:
    """Return the segments after the content of message `reply`; None if its content is not in them."""
    if segments is None or reply is None:
        return segments
    ends = [position for position, segment in enumerate(segments) if segment.message == reply]
    return segments[ends[-1] + 1 :] if ends else None
