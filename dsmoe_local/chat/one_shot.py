"""One prompt, one answer, the answer alone on the output stream."""

from __future__ import annotations

import dataclasses
import json
import signal
from typing import TextIO

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.engine.types import FinishReason


def answer(conversation: Conversation, text: str, out: TextIO, *, as_json: bool = False) -> None:
    """Write the reply to `text` as it comes, or as one JSON object at the end.

    The reply's leading whitespace belongs to the template and is left out, except in a completion. Control
    characters are made visible where `out` is a terminal. After Ctrl-C what came is written, then
    InterruptedRunError raised.
    """
    make_safe = safe_text if out.isatty() else str
    begun = conversation.completes
    pieces: list[str] = []
    events = conversation.send(text)
    before = signal.signal(signal.SIGINT, lambda number, frame: conversation.cancel())
    try:
        for event in events:
            piece = event.text if begun else event.text.lstrip()
            begun = begun or bool(piece)
            pieces.append(piece)
            if piece and not as_json:
                out.write(make_safe(piece))
                out.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    whole = "".join(pieces)
    if as_json:
        out.write(json.dumps(_envelope(conversation, whole), ensure_ascii=False) + "\n")
    elif not whole.endswith("\n"):
        out.write("\n")
    out.flush()
    if conversation.finish_reason is FinishReason.CANCELLED:
        raise InterruptedRunError("interrupted", signal_number=signal.SIGINT)


def _envelope(conversation: Conversation, text: str) -> dict[str, object]:
    usage = conversation.usage
    return {
        "text": text,
        "finish_reason": conversation.finish_reason,
        "usage": None if usage is None else dataclasses.asdict(usage),
        "model": conversation.engine.info.name,
    }
