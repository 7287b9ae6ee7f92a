"""A chat template, which renders conversations in a child process (`renderer`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from dsmoe_local.engine.process import wire
from dsmoe_local.engine.prompts.renderer import Renderer
from dsmoe_local.engine.prompts.segments import Segment, Segments
from dsmoe_local.engine.reasoning import markers_in
from dsmoe_local.engine.types import Message

Variables: TypeAlias = Mapping[str, Any]
"""Variables of a chat template beside the messages, as JSON values."""


class ChatTemplate:
    """A template with the texts of the model's special tokens. `source` says where it comes from.

    `markers` are those of reasoning, or None.
    """

    def __init__(self, text: str, source: str, *, bos: str = "", eos: str = "") -> None:
        """Compile the template. Raises TemplateError if it is not valid."""
        self.text = text
        self.source = source
        self.markers = markers_in(text)
        self._texts = {"bos_token": bos, "eos_token": eos}
        self._renderer = Renderer(text, source)

    def bind(self, *, bos: str, eos: str) -> None:
        """Set the texts of the special tokens."""
        self._texts = {"bos_token": bos, "eos_token": eos}

    def close(self) -> None:
        """End the child process."""
        self._renderer.close()

    def render(
        self, messages: Sequence[Message], variables: Variables | None = None, *, generate: bool = True
    ) -> str:
        """Return the conversation as text. With `generate` it ends where a new reply begins."""
        (text,) = self._ask("render", messages, variables, generate)
        return str(text)

    def segments(
        self, messages: Sequence[Message], variables: Variables | None = None, *, generate: bool = True
    ) -> Segments | None:
        """Return the conversation as segments (see `segments.Conversation.segments`)."""
        (segments,) = self._ask("segments", messages, variables, generate)
        return _segments(segments, messages)

    def stretches(
        self,
        messages: Sequence[Message],
        replies: Sequence[int],
        variables: Variables | None = None,
        *,
        open_end: bool,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Segments | None]:
        """Return the segments between replies (see `segments.Conversation.stretches`).

        Raises InterruptedRunError if `stopped` returns True.
        """
        found = self._ask("stretches", messages, variables, list(replies), open_end, stopped=stopped)
        return [_segments(segments, messages) for segments in found]

    def _ask(
        self,
        kind: str,
        messages: Sequence[Message],
        variables: Variables | None,
        *arguments: wire.Plain,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[wire.Plain]:
        plain = [wire.to_plain(replace(message, token_ids=())) for message in messages]
        own = {**(variables or {}), **self._texts}
        return self._renderer.ask(kind, plain, own, *arguments, stopped=stopped)


def _segments(value: wire.Plain, messages: Sequence[Message]) -> Segments | None:
    if value is None:
        return None
    return [
        Segment(messages[number].content if text is None else text, number, aside)
        for text, number, aside in value
    ]
