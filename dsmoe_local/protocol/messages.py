"""Read the messages of a conversation."""

from __future__ import annotations

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import Message
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.tools import calls_in_message
from dsmoe_local.protocol.values import text

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_REASONING_KEYS = ("reasoning_content", "reasoning")  # the second one is vLLM's newer name
_MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "refusal", "tool_calls", "tool_call_id", *_REASONING_KEYS}
)
_ROLE_OF = {"tool_calls": "assistant", "tool_call_id": "tool", **dict.fromkeys(_REASONING_KEYS, "assistant")}
"""The only role that may have a key."""


def messages(key: str, value: object) -> tuple[Message, ...]:
    """Return the messages of a conversation."""
    if not isinstance(value, list) or not value:
        raise RequestError(f"{key} is not a list of messages")
    return tuple(_message(item) for item in value)


def _message(item: object) -> Message:
    if not isinstance(item, dict) or "role" not in item or not {"content", "tool_calls"} & set(item):
        raise RequestError("a message takes role and content")
    given = {key for key, value in item.items() if value is not None and value != []}
    if foreign := sorted(given - _MESSAGE_KEYS):
        raise RequestError(f"a message's {safe_line(foreign[0], 40)} is not supported")
    role = text("role", item["role"])
    if role not in _ROLES:
        raise RequestError(
            f"the role {safe_line(role, 40)!r} is not supported", remedy=f"use {', '.join(_ROLES)}"
        )
    if key := next((key for key in sorted(given) if item[key] and _ROLE_OF.get(key, role) != role), ""):
        raise RequestError(f"only messages of the role {_ROLE_OF[key]} may have {key}")
    if role == "tool" and not item.get("tool_call_id"):
        raise RequestError("a message of the role tool takes tool_call_id")
    calls = tuple(calls_in_message(item.get("tool_calls") or []))
    key = next((key for key in _REASONING_KEYS if item.get(key)), "")
    return Message(
        _ROLES[role],
        "" if calls and item.get("content") is None else _content(item.get("content")),
        reasoning_content=text(key, item[key]) if key else "",
        tool_calls=calls,
        tool_call_id=text("tool_call_id", item.get("tool_call_id") or ""),
    )


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
