"""Replies of reasoning models in a prompt: their original token ids, as far as the template keeps their text.

Most templates drop the reasoning of earlier replies. The token ids of the answer alone stay then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dsmoe_local.engine.prompts.segments import Segment
from dsmoe_local.engine.reasoning import ReasoningFormat
from dsmoe_local.engine.types import Message

Part: TypeAlias = Segment | tuple[int, ...]
"""Text, or the token ids of a reply."""


def with_reply_ids(
    segments: Sequence[Segment], messages: Sequence[Message], form: ReasoningFormat
) -> list[Part]:
    """Return the segments of a conversation, with token ids in place of replies whose text they have."""
    parts: list[Part] = []
    for segment in segments:
        message = None if segment.message is None or segment.aside else messages[segment.message]
        if message is None or message.role != "assistant" or not message.token_ids:
            parts.append(segment)
            continue
        pieces = [form.piece(token_id) for token_id in message.token_ids]
        if not _replace_whole(parts, segment, message.token_ids, pieces):
            parts.append(_answer_ids(segment.text, message.token_ids, pieces, form) or segment)
    return parts


def reply_to_continue(
    prompt: Sequence[Segment], message: Message, index: int, form: ReasoningFormat
) -> list[Part]:
    """Return what follows `prompt` when the reply `message`, with the number `index`, is continued."""
    if message.token_ids:
        return [message.token_ids]
    end = prompt[-1].text.rstrip() if prompt else ""
    opened, closed = map(end.endswith, form.markers)
    reasoning = "" if closed else message.reasoning_content
    parts: list[Part] = []
    if reasoning:
        parts += [] if opened else [Segment(f"{form.markers.open}\n")]
        parts.append(Segment(reasoning, index, True))
    if message.content:
        parts += [Segment(f"\n{form.markers.close}\n\n")] if reasoning or opened else []
        parts.append(Segment(message.content, index))
    return parts


def _replace_whole(
    parts: list[Part], answer: Segment, token_ids: tuple[int, ...], pieces: Sequence[bytes]
) -> bool:
    """Replace the end of `parts`, the reasoning before `answer`, by the token ids of both.

    Returns False if the template dropped the reasoning, or if it or the model wrote other text around it.
    """
    match parts[-3:]:
        case [
            Segment(message=None) as before,
            Segment(aside=True) as kept,
            Segment(message=None) as mark,
        ]:
            lead, _, rest = _text(pieces).partition(kept.text)
            same = rest == mark.text + answer.text and before.text.endswith(lead)
            if kept.message == answer.message and same:
                parts[-3:] = [Segment(before.text.removesuffix(lead)), token_ids]
                return True
    return False


def _answer_ids(
    text: str, token_ids: tuple[int, ...], pieces: Sequence[bytes], form: ReasoningFormat
) -> tuple[int, ...] | None:
    """Return the ids of the answer, without whitespace around it; None if their text is not `text`."""
    first, last = _end_of_reasoning(pieces, form.markers.close.encode()), len(pieces)
    if _text(pieces[first:]) != text:
        while first < last and not pieces[first].strip():
            first += 1
        while first < last and not pieces[last - 1].strip():
            last -= 1
        if _text(pieces[first:last]) != text:
            return None
    return token_ids[first:last]


def _end_of_reasoning(pieces: Sequence[bytes], close: bytes) -> int:
    """Return the number of pieces up to the closing marker; 0 if there is none."""
    end = b""
    for number, piece in enumerate(pieces, 1):
        end = end[-len(close) :] + piece
        if close in end:
            return number
    return 0


def _text(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")
