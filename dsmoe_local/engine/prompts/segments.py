"""Splits a rendered conversation into the template's own text and the contents of messages."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.types import Message, ToolCall

if TYPE_CHECKING:  # only the template's process imports jinja2
    from dsmoe_local.engine.prompts.sandbox import SandboxedTemplate
    from dsmoe_local.engine.prompts.turns import Checkpoint

_TOOLS = -1
"""The index in segments from the definitions of tools, which are not in a message."""


class Segment(NamedTuple):
    """A part of a rendered conversation.

    It is text of the message with the index `message`, or the template's own text if the index is None.
    `aside`: it is not the content of the message, but its reasoning, or a string in its tool calls.
    """

    text: str
    message: int | None = None
    aside: bool = False


Segments: TypeAlias = list[Segment]


class Conversation:
    """A conversation to render. To find the contents, it is rendered a second time with placeholders.

    The whitespace around a content stays around its placeholder, so that templates may trim it. Templates
    split replies at the markers of reasoning. A reply is passed to them without its reasoning, so markers
    that are left in it are ordinary text, and are hidden from the template.

    The strings in arguments of tool calls and the descriptions in `tools` have placeholders as well.
    """

    def __init__(
        self, template: SandboxedTemplate, messages: Sequence[Message], tools: object = None
    ) -> None:
        self._template = template
        self._n_messages = len(messages)
        self._key = key = secrets.token_hex(8)
        self._placeholder = re.compile(rf"{key}\.(\d+)\.")
        self._hidden = {marker: f"{key}_{index}_" for index, marker in enumerate(template.markers or ())}
        # By the number of the placeholder: a text, its message, and whether it is not the message's content.
        self._texts: list[tuple[str, int, bool]] = []
        called = {call.id: call.name for message in messages for call in message.tool_calls}
        self._real = [self._as_read(message, called) for message in messages]
        self._masked = [
            self._as_read(message, called, partial(self._mask, index))
            for index, message in enumerate(messages)
        ]
        self._tools = tools
        self._masked_tools = _with_masked_descriptions(tools, partial(self._mask, _TOOLS, True))

    def render(self, *, generate: bool = True) -> str:
        """Return the conversation as text."""
        return self._shown(self._template.render(self._real, self._tools, generate=generate))

    def segments(self, end: int | None = None, *, generate: bool = True) -> Segments | None:
        """Return the segments of the messages before `end`.

        Returns None if the template depends on the contents, or changes them other than by trimming.
        """
        masked = self._template.render(self._masked[:end], self._masked_tools, generate=generate)
        return self._split(masked, self._template.render(self._real[:end], self._tools, generate=generate))

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
            masked = self._template.begin(self._masked[:end], self._masked_tools, progress.masked)
            real = self._template.begin(self._real[:end], self._tools, progress.real)
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
        position = len(pieces[0])
        for place, number in zip(range(1, len(pieces), 2), numbers, strict=True):
            text, _, aside = self._texts[number]
            forms = _forms(text.strip()) if aside else (text.strip(),)
            after = pieces[place + 1]
            form = next((form for form in forms if real.startswith(form + after, position)), None)
            if form is None:
                return None
            pieces[place] = form
            position += len(form) + len(after)
        if not real.startswith(pieces[0]) or position != len(real):
            return None
        self._move_whitespace(pieces, numbers)
        segments = [Segment(pieces[0])]
        for number, text, after in zip(numbers, pieces[1::2], pieces[2::2], strict=True):
            _, message, aside = self._texts[number]
            segments += [Segment(self._shown(text), message, aside), Segment(after)]
        return [segment for segment in segments if segment.text]

    def _move_whitespace(self, pieces: list[str], numbers: Sequence[int]) -> None:
        """Move the whitespace of contents from the template's text to the contents."""
        for position, number in zip(range(1, len(pieces), 2), numbers, strict=True):
            text = self._texts[number][0]
            lead = text[: len(text) - len(text.lstrip())]
            trail = text[len(text.rstrip()) :]
            before, after = pieces[position - 1], pieces[position + 1]
            if lead and before.endswith(lead):
                pieces[position - 1], pieces[position] = before[: -len(lead)], lead + pieces[position]
            if trail and after.startswith(trail):
                pieces[position + 1], pieces[position] = after[len(trail) :], pieces[position] + trail

    def _as_read(
        self,
        message: Message,
        called: Mapping[str, str],
        mask: Callable[[bool, str], str] = lambda aside, text: text,
    ) -> dict[str, Any]:
        """Return a message as a template reads it: as in OpenAI's requests.

        `called` are the names of tools by the id of a call. Markers in replies are hidden. `mask` returns a
        text as the template reads it. It also takes whether the text is not the content of the message.
        """
        content, reasoning = message.content, message.reasoning_content
        if message.role == "assistant":
            for marker, hidden in self._hidden.items():
                content, reasoning = content.replace(marker, hidden), reasoning.replace(marker, hidden)
        read: dict[str, Any] = {"role": message.role, "content": mask(False, content)}
        if reasoning:
            read["reasoning_content"] = mask(True, reasoning)
        if message.tool_calls:
            read["tool_calls"] = [_call_as_read(call, partial(mask, True)) for call in message.tool_calls]
            if not content and self._template.null_content:
                read["content"] = None
        if message.tool_call_id:
            read["tool_call_id"] = message.tool_call_id
            read["name"] = called.get(message.tool_call_id, "")
        return read

    def _mask(self, message: int, aside: bool, text: str) -> str:
        """Return `text` with a placeholder in place of all but the whitespace around it."""
        core = text.strip()
        if not core:
            return text
        self._texts.append((text, message, aside))
        return text.replace(core, f"{self._key}.{len(self._texts) - 1}.", 1)

    def _shown(self, text: str) -> str:
        for marker, hidden in self._hidden.items():
            text = text.replace(hidden, marker)
        return text


class _Arguments(dict[str, Any]):
    """Arguments of a call: an object, and its JSON text for templates that print it or append it to text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


def _call_as_read(call: ToolCall, mask: Callable[[str], str]) -> dict[str, Any]:
    arguments = _Arguments(_with_masked_strings(json.loads(call.arguments), mask))
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _with_masked_strings(value: Any, mask: Callable[[str], str]) -> Any:  # noqa: ANN401 - a JSON value
    if isinstance(value, dict):
        return {mask(key): _with_masked_strings(item, mask) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_masked_strings(item, mask) for item in value]
    return mask(value) if isinstance(value, str) else value


def _with_masked_descriptions(value: Any, mask: Callable[[str], str]) -> Any:  # noqa: ANN401 - a JSON value
    if isinstance(value, dict):
        return {
            key: mask(item)
            if key == "description" and isinstance(item, str)
            else _with_masked_descriptions(item, mask)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_masked_descriptions(item, mask) for item in value]
    return value


def _forms(text: str) -> tuple[str, ...]:
    """Return a text as a template may print it: as it is, or within a string of JSON."""
    return (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])


@dataclass(slots=True)
class _Progress:
    """The checkpoints of the last prefix, with and without placeholders.

    If `failed`, later prefixes cannot continue from them.
    """

    masked: Checkpoint | None = None
    real: Checkpoint | None = None
    failed: bool = False


def _after(segments: Segments | None, reply: int | None) -> Segments | None:
    """Return the segments after the content of message `reply`; None if its content is not in them."""
    if segments is None or reply is None:
        return segments
    ends = [
        position
        for position, segment in enumerate(segments)
        if segment.message == reply and not segment.aside
    ]
    return segments[ends[-1] + 1 :] if ends else None
