"""Splits a rendered conversation into the template's own text and the contents of messages."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.reasoning import Markers
from dsmoe_local.engine.types import Message


class Segment(NamedTuple):
    """A part of a rendered conversation.

    It is the content of the message with the index `message`, or its reasoning, or the template's own text if
    the index is None.
    """

    text: str
    message: int | None = None
    reasoning: bool = False


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

    @property
    def markers(self) -> Markers | None: ...

    def render(self, messages: Sequence[dict[str, str]], *, generate: bool = True) -> str: ...

    def begin(self, messages: Sequence[dict[str, str]], after: Any = None) -> Rendered: ...  # noqa: ANN401


class Conversation:
    """A conversation to render. To find the contents, it is rendered a second time with placeholders.

    The whitespace around a content stays around its placeholder, so that templates may trim it. Templates
    split replies at the markers of reasoning. A reply is passed to them without its reasoning, so markers
    that are left in it are ordinary text, and are hidden from the template.
    """

    def __init__(self, template: Template, messages: Sequence[Message]) -> None:
        self._template = template
        self._n_messages = len(messages)
        key = secrets.token_hex(8)
        self._placeholder = re.compile(rf"{key}\.(\d+)\.")
        self._hidden = {marker: f"{key}_{index}_" for index, marker in enumerate(template.markers or ())}
        # The placeholder 2i stands for the content of message i, 2i + 1 for its reasoning.
        self._texts = [text for each in messages for text in self._contents(each)]
        masked = [_masked(text, f"{key}.{number}.") for number, text in enumerate(self._texts)]
        self._real = _as_read(messages, self._texts)
        self._masked = _as_read(messages, masked)

    def render(self, *, generate: bool = True) -> str:
        """Return the conversation as text."""
        return self._shown(self._template.render(self._real, generate=generate))

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
        ends = [*replies, *([self._n_messages] if open_end else [])]
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
        numbers = [int(piece) for piece in pieces[1::2]]
        pieces[1::2] = [self._texts[number].strip() for number in numbers]
        if "".join(pieces) != real:
            return None
        self._move_whitespace(pieces, numbers)
        segments = [Segment(pieces[0])]
        for number, text, after in zip(numbers, pieces[1::2], pieces[2::2], strict=True):
            segments += [Segment(self._shown(text), number // 2, bool(number % 2)), Segment(after)]
        return [segment for segment in segments if segment.text]

    def _move_whitespace(self, pieces: list[str], numbers: Sequence[int]) -> None:
        """Move the whitespace of contents from the template's text to the contents."""
        for position, number in zip(range(1, len(pieces), 2), numbers, strict=True):
            text = self._texts[number]
            lead = text[: len(text) - len(text.lstrip())]
            trail = text[len(text.rstrip()) :]
            before, after = pieces[position - 1], pieces[position + 1]
            if lead and before.endswith(lead):
                pieces[position - 1], pieces[position] = before[: -len(lead)], lead + pieces[position]
            if trail and after.startswith(trail):
                pieces[position + 1], pieces[position] = after[len(trail) :], pieces[position] + trail

    def _contents(self, message: Message) -> tuple[str, str]:
        """Return content and reasoning of a message, with hidden markers if it is a reply."""
        content, reasoning = message.content, message.reasoning_content
        if message.role == "assistant":
            for marker, hidden in self._hidden.items():
                content, reasoning = content.replace(marker, hidden), reasoning.replace(marker, hidden)
        return content, reasoning

    def _shown(self, text: str) -> str:
        for marker, hidden in self._hidden.items():
            text = text.replace(hidden, marker)
        return text


def _as_read(messages: Sequence[Message], texts: Sequence[str]) -> list[dict[str, str]]:
    """Return messages as a template reads them. `texts` are content and reasoning of each in turn."""
    return [
        {"role": message.role, "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
        for message, content, reasoning in zip(messages, texts[::2], texts[1::2], strict=True)
    ]


def _masked(text: str, placeholder: str) -> str:
    """Return `text` with a placeholder in place of all but the whitespace around it."""
    core = text.strip()
    return text.replace(core, placeholder, 1) if core else text


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
    ends = [
        position
        for position, segment in enumerate(segments)
        if segment.message == reply and not segment.reasoning
    ]
    return segments[ends[-1] + 1 :] if ends else None
