"""Chat templates: which one a model uses, and rendering conversations with it. Knows no tokens.

The order: what the user names (a file, or a built-in), the file's own, the built-in of a chat model that
lacks one, else none: completion only. What a template may do is `sandbox`'s concern.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.prompts.sandbox import SandboxedTemplate
from dsmoe_local.engine.types import Message

BUILT_IN = {
    "deepseek-moe": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_CHAT_MODEL = re.compile(r"(?i)\b(chat|instruct|it)\b")
_MAX_TEMPLATE = 1 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered conversation.

    `message`: whose content it is; None for the template's own text.
    """

    text: str
    message: int | None = None


class ChatTemplate:
    """One template with the model's special texts bound. `source` says where it comes from."""

    def __init__(self, text: str, source: str, *, bos: str, eos: str) -> None:
        """Raises TemplateError if `text` is no template."""
        self.source = source
        self._template = SandboxedTemplate(text, source, {"bos_token": bos, "eos_token": eos})

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The conversation as text; with `generate` it ends where the assistant's reply begins."""
        values = [{"role": message.role, "content": message.content} for message in messages]
        return self._template.render(messages=values, add_generation_prompt=generate)

    def segments(self, messages: Sequence[Message], *, generate: bool = True) -> list[Segment] | None:
        """`render` with the messages' contents told apart from the template's text.

        Each content is rendered as a unique placeholder that keeps the content's outer whitespace, so that a
        template may trim it. None if the template looks at the contents or changes them in another way.
        """
        key = secrets.token_hex(8)
        cores = [message.content.strip() for message in messages]
        masked = [
            Message(
                message.role, message.content.replace(core, f"{key}.{index}.", 1) if core else message.content
            )
            for index, (message, core) in enumerate(zip(messages, cores, strict=True))
        ]
        pieces = re.split(rf"{key}\.(\d+)\.", self.render(masked, generate=generate))
        segments = [
            Segment(cores[int(piece)], int(piece)) if position % 2 else Segment(piece)
            for position, piece in enumerate(pieces)
        ]
        if "".join(segment.text for segment in segments) != self.render(messages, generate=generate):
            return None
        return _with_whitespace(segments, messages)


def _with_whitespace(segments: list[Segment], messages: Sequence[Message]) -> list[Segment]:
    """Move a content's own outer whitespace, where the template kept it, from the template's text to the
    content.
    """
    texts = [segment.text for segment in segments]
    for position in range(1, len(segments), 2):
        content = messages[segments[position].message or 0].content
        lead = content[: len(content) - len(content.lstrip())]
        trail = content[len(content.rstrip()) :]
        before, after = texts[position - 1], texts[position + 1]
        if lead and before.endswith(lead):
            texts[position - 1], texts[position] = before[: -len(lead)], lead + texts[position]
        if trail and after.startswith(trail):
            texts[position + 1], texts[position] = after[len(trail) :], texts[position] + trail
    return [Segment(text, segment.message) for text, segment in zip(texts, segments, strict=True) if text]


def choose_template(
    requested: str | None, own: str | None, *, architecture: str, name: str
) -> tuple[str, str] | None:
    """The template's text and where it comes from; None for completion only. Raises UsageError, FileError."""
    if requested is not None:
        if requested in BUILT_IN:
            return BUILT_IN[requested], f"built-in {requested}"
        return _read_template(Path(requested)), safe_line(Path(requested).name, 60)
    if own:
        return own, "the model's own"
    if architecture == "deepseek" and _CHAT_MODEL.search(re.sub(r"[-_.]", " ", name)):
        return BUILT_IN["deepseek-moe"], "built-in deepseek-moe"
    return None


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEMPLATE + 1)
        if len(content) > _MAX_TEMPLATE:
            raise FileError("the chat template is larger than 1 MiB", where=path)
        return content.decode("utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"--chat-template {safe_line(str(path), 60)!r} is no file and no built-in template",
            remedy=f"name a file, or one of: {', '.join(BUILT_IN)}",
        ) from error
    except UnicodeDecodeError as error:
        raise FileError("the chat template is not UTF-8", where=path) from error
    except OSError as error:
        raise FileError(f"the chat template cannot be read: {error.strerror}", where=path) from error
