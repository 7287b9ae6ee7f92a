"""A conversation as Markdown or JSON.

In Markdown, messages are quoted, and replies are as the model wrote them. A reply cannot change what follows
it: a code block that it leaves open is closed. HTML in it is not changed.

The JSON has the messages of OpenAI's chat API, with more fields:

    {
      "format": "dsmoe-local conversation", "version": 1,
      "title": …, "model": …, "exported": ISO 8601,
      "vocabulary": digest of the tokenizer of the token ids, or "",
      "n_left_out": …, "n_shifted": …      what has left the context, see chat.turns.Transcript
      "messages": [
        {"role": "system", "content": …}   only if there is a system text
        {"role": "user", "content": …},
        {"role": "assistant", "content": …, "token_ids": [exact ids, or none],
         "reasoning_content": …            only if there is reasoning
         "finish_reason": FinishReason or null, "usage": the fields of engine.types.Usage or null}
      ]
    }

Control characters, and those that change the direction of the text around them, are \\u escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

from dsmoe_local.base.text import count, safe_file_line, safe_file_text
from dsmoe_local.chat.attachments import in_fence, without_files
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason

FORMAT = "dsmoe-local conversation"
VERSION = 1
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")
_PROBE = "end-of-the-reply"  # the text of a heading, which is only a heading after closed blocks
_TITLE_LENGTH = 60
_REMARKS: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "cut at the maximum length",
    FinishReason.CONTEXT_FULL: "cut: the context was full",
    FinishReason.CANCELLED: "stopped by the user",
}


@dataclass(frozen=True, slots=True)
class About:
    """The metadata of an exported conversation. `vocabulary` as in ModelInfo: it identifies the tokenizer."""

    title: str
    model: str
    exported: datetime
    vocabulary: str = ""

    def facts(self, transcript: Transcript) -> str:
        """Return model, time and length on one line of safe text."""
        length = count(len(transcript.turns), "message")
        when = f"{self.exported:%Y-%m-%d %H:%M}"
        return f"{self.model_name} · {when} · {length}"

    def speaker(self, turn: Turn) -> str:
        """Return who wrote a turn, as safe text."""
        return "You" if turn.role is Role.USER else self.model_name

    @property
    def model_name(self) -> str:
        """The model's name as safe text."""
        return safe_file_line(self.model).strip() or "Model"


def title_of(transcript: Transcript) -> str:
    """Return the beginning of the first message, on one line."""
    first = without_files(transcript.turns[0].content).strip() if transcript.turns else ""
    return safe_file_line(" ".join(first[: 4 * _TITLE_LENGTH].split()), _TITLE_LENGTH) or "Conversation"


def remark(turn: Turn) -> str:
    """Return why a reply was cut or stopped; empty if it is complete."""
    return _REMARKS.get(turn.ending, "") if turn.ending is not None else ""


def body(turn: Turn) -> str:
    """Return the text of a turn as safe text, without blank lines around it.

    Spaces at the beginning of a reply belong to the template and are removed.
    """
    text = safe_file_text(turn.content.replace("\r\n", "\n")).strip("\n")
    return text.strip() if turn.role is Role.ASSISTANT else text


def reasoning(turn: Turn) -> str:
    """Return the reasoning before a reply as safe text; empty if there is none."""
    return safe_file_text(turn.reasoning.replace("\r\n", "\n")).strip()


def export_markdown(transcript: Transcript, about: About) -> str:
    """Return a conversation as Markdown, with a heading for each turn."""
    parts = [f"# {_escaped(about.title)}", f"*{_escaped(about.facts(transcript))}*"]
    if transcript.system:
        parts += ["## System", _quoted(body(Turn(Role.USER, transcript.system)))]
    for turn in transcript.turns:
        parts.append(f"## {_escaped(about.speaker(turn))}")
        if thought := reasoning(turn):
            # In a code block, so that no tag in it can close the fold.
            parts += ["<details>\n<summary>Reasoning</summary>", in_fence(thought), "</details>"]
        if text := body(turn):
            parts.append(_quoted(text) if turn.role is Role.USER else contained(text))
        if said := remark(turn):
            parts.append(f"*({said})*")
    return "\n\n".join(parts) + "\n"


def contained(text: str) -> str:
    """Return Markdown `text` with an open code block closed, so that it does not affect what follows."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark")

    def closed(document: str) -> bool:
        last = markdown.parse(f"{document}\n\n# {_PROBE}\n")[-2:]
        return [token.type for token in last] == ["inline", "heading_close"] and last[1].level == 0

    if closed(text):
        return text
    last = markdown.parse(text)[-1]
    ended = f"{text}\n{last.markup}"
    if last.type == "fence" and closed(ended):
        return ended
    return in_fence(text)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _escaped(text: str) -> str:
    """Return `text` on one line, with Markdown's special characters escaped."""
    return _PUNCTUATION.sub(r"\\\1", safe_file_line(text))


def export_json(transcript: Transcript, about: About) -> str:
    """Return a conversation as JSON, with one message on a line."""
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
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        message["token_ids"] = turn.token_ids
        message["finish_reason"] = turn.ending
        message["usage"] = None if turn.usage is None else asdict(turn.usage)
    return message
