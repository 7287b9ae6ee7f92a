"""A conversation as JSON that other programs understand, and that is read back exactly.

    {
      "format": "dsmoe-local conversation", "version": 1,
      "title": …, "model": …, "exported": ISO 8601,
      "vocabulary": digest of the tokenizer that the token ids belong to, or "",
      "n_left_out": …, "n_shifted": …      how much has left the context, see chat.turns.Transcript
      "messages": [
        {"role": "system", "content": …}   only where there is a system text
        {"role": "user", "content": …},
        {"role": "assistant", "content": …, "token_ids": [exact ids, or none],
         "finish_reason": FinishReason or null, "usage": the fields of engine.types.Usage or null}
      ]
    }

`messages` are those of OpenAI's chat API with fields beside. Control, bidi and other characters that a
terminal would obey are written as \\u escapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.export.about import About
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason, Usage

FORMAT = "dsmoe-local conversation"
VERSION = 1
_SYSTEM = "system"
_T = TypeVar("_T")


def export_json(transcript: Transcript, about: About) -> str:
    """The whole conversation; one message on a line."""
    system = [{"role": _SYSTEM, "content": transcript.system}] if transcript.system else []
    messages = [*system, *(_message(turn) for turn in transcript.turns)]
    head = {
        "format": FORMAT,
        "version": VERSION,
        "title": about.title,
        "model": about.model,
        "exported": about.exported.isoformat(),
        "vocabulary": about.vocabulary,
        "n_left_out": transcript.n_left_out,
        "n_shifted": transcript.n_shifted,
    }
    fields = [f"{_dump(key)}: {_dump(value)}" for key, value in head.items()]
    lines = ",\n".join(f"    {_dump(message)}" for message in messages)
    fields.append(f'"messages": [\n{lines}\n  ]' if messages else '"messages": []')
    return "{\n  " + ",\n  ".join(fields) + "\n}\n"


def import_json(text: str) -> tuple[Transcript, About]:
    """What `export_json` was given. FormatError if the text is no such file."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("the conversation is not JSON", where=str(error)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError("this is no exported conversation", where=f'"format" is not "{FORMAT}"')
    if document.get("version") != VERSION:
        raise FormatError(
            f"the conversation has version {document.get('version')!r}",
            remedy=f"this program reads version {VERSION}",
        )
    messages = _list(document, "messages", dict)
    system = ""
    if messages and messages[0].get("role") == _SYSTEM:
        system = _get(messages.pop(0), "content", str)
    transcript = Transcript(
        tuple(_turn(message) for message in messages),
        system,
        _count(document, "n_left_out"),
        _count(document, "n_shifted"),
    )
    return transcript, About(
        _get(document, "title", str),
        _get(document, "model", str),
        _read(document, "exported", datetime.fromisoformat),
        _get(document, "vocabulary", str),
    )


def _dump(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for character in set(text):
        if safe_text(character) != character:
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.role is Role.ASSISTANT:
        message["token_ids"] = turn.token_ids
        message["finish_reason"] = turn.ending
        message["usage"] = None if turn.usage is None else asdict(turn.usage)
    return message


def _turn(message: Mapping[str, Any]) -> Turn:
    usage = message.get("usage")
    return Turn(
        _read(message, "role", Role),
        _get(message, "content", str),
        tuple(_list(message, "token_ids", int)) if "token_ids" in message else (),
        None if message.get("finish_reason") is None else _read(message, "finish_reason", FinishReason),
        None if usage is None else _read(message, "usage", lambda values: Usage(**values)),
    )


def _get(values: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = values.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError("the conversation is damaged", where=f'"{key}" is missing or of another type')
    return value


def _count(values: Mapping[str, Any], key: str) -> int:
    return max(_get(values, key, int), 0)


def _list(values: Mapping[str, Any], key: str, kind: type[_T]) -> list[_T]:
    items = _get(values, key, list)
    if any(type(item) is not kind for item in items):
        raise FormatError("the conversation is damaged", where=f'an item of "{key}" is of another type')
    return items


def _read(values: Mapping[str, Any], key: str, read: Callable[[Any], _T]) -> _T:
    try:
        return read(values.get(key))
    except (ValueError, TypeError) as error:
        raise FormatError("the conversation is damaged", where=f'"{key}": {error}') from error
