"""A conversation as JSON that other programs understand, and that has all there is of it.

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

`messages` are those of OpenAI's chat API with fields beside. Control characters, and those that could reorder
the text around them, are written as \\u escapes.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from dsmoe_local.base.text import safe_file_text
from dsmoe_local.chat.export.about import About
from dsmoe_local.chat.turns import Role, Transcript, Turn

FORMAT = "dsmoe-local conversation"
VERSION = 1


def export_json(transcript: Transcript, about: About) -> str:
    """The whole conversation; one message on a line."""
    system = [{"role": "system", "content": transcript.system}] if transcript.system else []
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


def _dump(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for character in set(text):
        if safe_file_text(character) != character:
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.role is Role.ASSISTANT:
        message["token_ids"] = turn.token_ids
        message["finish_reason"] = turn.ending
        message["usage"] = None if turn.usage is None else asdict(turn.usage)
    return message
