"""Anthropic's messages: a body to that of a chat completion, and replies to messages and their events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmoe_local.engine.types import FinishReason
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.replies import Choice, Delta, Reply
from dsmoe_local.protocol.tools import refuse_tools
from dsmoe_local.protocol.writers import Event

_STOP_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.CONTEXT_FULL: "model_context_window_exceeded",
}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat completion that a body of /v1/messages asks for. Raises RequestError.

    As in Anthropic's API, a last message of the assistant is continued.
    """
    if not isinstance(body.get("max_tokens"), int):
        raise RequestError("max_tokens is missing", remedy="set it to a number of tokens", param="max_tokens")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages", param="messages")
    refuse_tools(body)
    translated = {"system", "messages", "stop_sequences", "thinking"}
    chat = {key: value for key, value in body.items() if key not in translated}
    turns = [_message(message) for message in messages]
    if body.get("system"):
        turns.insert(0, {"role": "system", "content": _plain_blocks(body["system"])})
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        chat["continue_final_message"] = True
    chat["messages"] = turns
    if "stop_sequences" in body:
        chat["stop"] = body["stop_sequences"]
    if body.get("thinking") is not None:
        chat["reasoning_budget"] = _reasoning_budget(body["thinking"])
    return chat


def _message(message: object) -> object:
    """Return a message in OpenAI's form. Whatever is not known is left as it is, to be refused by name."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    blocks = message["content"]
    reasoning = [
        str(block.get("thinking", ""))
        for block in blocks
        if isinstance(block, dict) and block.get("type") == "thinking"
    ]
    turn = {**message, "content": _plain_blocks(blocks)}
    return {**turn, "reasoning_content": "".join(reasoning)} if reasoning else turn


def _plain_blocks(content: object) -> object:
    """Return content without blocks of reasoning and without marks for caching."""
    if not isinstance(content, list):
        return content
    hidden = ("thinking", "redacted_thinking")
    return [
        {key: value for key, value in block.items() if key != "cache_control"}
        if isinstance(block, dict)
        else block
        for block in content
        if not (isinstance(block, dict) and block.get("type") in hidden)
    ]


def _reasoning_budget(thinking: object) -> object:
    """Return the number of tokens for reasoning; None for no limit."""
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind == "disabled":
        return 0
    if isinstance(thinking, dict) and kind == "enabled":
        return thinking.get("budget_tokens")
    if kind == "adaptive":
        return None
    raise RequestError("thinking.type is not enabled, adaptive or disabled", param="thinking")


class MessageWriter:
    """Writes the reply to one request of /v1/messages. `name` is the unique part of its id."""

    done = b""

    def __init__(self, name: str, model: str) -> None:
        self._message: dict[str, Any] = {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._n_blocks = 0
        self._open = ""  # the type of the block that is being sent
        self._begun = False

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the message."""
        (choice,) = reply.choices
        return {
            **self._message,
            "content": _content(choice),
            "stop_reason": _STOP_REASONS[choice.finish_reason],
            "usage": _usage(reply),
        }

    def events(self, delta: Delta) -> list[Event]:
        """Return the events of a delta: blocks of thinking and text begin and end as needed."""
        found: list[Event] = []
        if not self._begun:
            self._begun = True
            # The number of prompt tokens is not known yet; the last event has it.
            usage = {"input_tokens": 0, "output_tokens": 0}
            found.append(("message_start", {"message": {**self._message, "usage": usage}}))
        for kind, key, text in (
            ("thinking", "thinking", delta.reasoning),
            ("text", "text", delta.text),
        ):
            if text:
                found += self._switch(kind)
                part = {"type": f"{kind}_delta", key: text}
                found.append(("content_block_delta", {"index": self._n_blocks - 1, "delta": part}))
        return [(name, {"type": name, **value}) for name, value in found]

    def end(self, reply: Reply) -> list[Event]:
        """Return the last events."""
        (choice,) = reply.choices
        found = self._switch("")
        ending = {"stop_reason": _STOP_REASONS[choice.finish_reason], "stop_sequence": None}
        found.append(("message_delta", {"delta": ending, "usage": _usage(reply)}))
        found.append(("message_stop", {}))
        return [(name, {"type": name, **value}) for name, value in found]

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error object."""
        return "error", {"type": "error", **error}

    def _switch(self, kind: str) -> list[Event]:
        """End the current block if it has another type, and begin the next one, if `kind` is not empty."""
        if self._open == kind:
            return []
        found: list[Event] = []
        if self._open:
            found.append(("content_block_stop", {"index": self._n_blocks - 1}))
        if kind:
            block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
            found.append(("content_block_start", {"index": self._n_blocks, "content_block": block}))
            self._n_blocks += 1
        self._open = kind
        return found


def _content(choice: Choice) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.text or not blocks:
        blocks.append({"type": "text", "text": choice.text})
    return blocks


def _usage(reply: Reply) -> dict[str, int]:
    # Anthropic counts cached tokens apart.
    return {
        "input_tokens": reply.n_prompt_tokens - reply.n_cached_tokens,
        "cache_read_input_tokens": reply.n_cached_tokens,
        "output_tokens": reply.n_completion_tokens,
    }
