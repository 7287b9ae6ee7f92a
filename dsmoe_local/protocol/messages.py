"""Read the messages of a conversation."""

from __future__ import annotations

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import Message
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.values import text

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_REASONING_KEYS = ("reasoning_content", "reasoning")  # the second one is vLLM's newer name
_MESSAGE_KEYS = frozenset({"role", "content", "name", "refusal", *_REASONING_KEYS})


def messages(key: str, value: object) -> tuple[Message, ...]:
    """Return the messages of a conversation."""
    if not isinstance(value, list) or not value:
        raise RequestError(f"{key} is not a list of messages")
    return tuple(_message(item) for item in value)


def _message(item: object) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= set(item):
        raise RequestError("a message takes role and content")
    given = {key for key, value in item.items() if value is not None and value != []}
    if foreign := sorted(given - _MESSAGE_KEYS):
        raise RequestError(f"a message's {safe_line(foreign[0], 40)} is not supported")
    role = text("role", item["role"])
    if role not in _ROLES:
        raise RequestError(f"the role {safe_line(role, 40)!r} is not supported")
    key = next((key for key in _REASONING_KEYS if item.get(key)), "")
    reasoning = text(key, item[key]) if key else ""
    if key and role != "assistant":
        raise RequestError(f"only messages of the assistant may have {key}")
    return Message(_ROLES[role], _content(item["content"]), reasoning_content=reasoning)


def _content(value: object) -> str:
    if not isinstance(value, list):
        return text("content", value)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"content of the type {safe_line(str(kind), 40)!r} is not supported")
        texts.append(text("content", part.get("text")))
    return "\n".join(texts)
