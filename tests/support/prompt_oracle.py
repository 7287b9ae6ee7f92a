"""A slow reference for encoding conversations: every prefix is rendered from the start.

Plain jinja2, a list of dictionaries, no state from one rendering to the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsmoe_local.engine.types import Message

BOS, EOS = "<s>", "</s>"
SPECIAL = (
    BOS,
    EOS,
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[INST]",
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL)))
_KEY = "b7e1c0ffee"


class RefusalError(Exception):
    """The conversation cannot be encoded, for this reason."""


class ChunkVocabulary:
    """Text in chunks of three bytes, so that ids depend on where a text begins; special texts are one id."""

    bos = 1
    adds_bos = True
    n_vocab = 1 << 40

    def __init__(self) -> None:
        self.n_calls = 0
        self.n_bytes = 0

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """See `encoder.Vocabulary`."""
        self.n_calls += 1
        self.n_bytes += len(text)
        ids: list[int] = []
        pieces = _SPECIAL.split(text.decode()) if special else [text.decode()]
        found = [*(_SPECIAL.findall(text.decode()) if special else []), None]
        for piece, token in zip(pieces, found, strict=True):
            chunk = piece.encode()
            ids += [1000 + int.from_bytes(chunk[at : at + 3], "big") for at in range(0, len(chunk), 3)]
            if token is not None:
                ids.append(1 + SPECIAL.index(token))
        return ids

    def special_texts(self) -> frozenset[str]:
        """See `encoder.Vocabulary`."""
        return frozenset(SPECIAL)

    def piece(self, token_id: int) -> bytes:
        """See `reasoning.Vocabulary`."""
        value = token_id - 1000
        return value.to_bytes((value.bit_length() + 7) // 8, "big") if value > 0 else b""

    def text_of(self, token_id: int) -> str:
        """See `reasoning.Vocabulary`."""
        return SPECIAL[token_id - 1] if token_id < 1000 else self.piece(token_id).decode("utf-8", "replace")

    def ends(self, token_id: int) -> bool:
        """See `reasoning.Vocabulary`."""
        return False


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def encode(text: str, messages: Sequence[Message], *, continued: bool) -> list[int]:
    """Return the ids of a conversation. Raises RefusalError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "bos_token": BOS, "eos_token": EOS}
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    try:
        template = environment.from_string(text)
        return _with_bos(_Oracle(template).ids(messages, continued))
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RefusalError(str(error)) from error


def _with_bos(ids: list[int]) -> list[int]:
    return ids if ids[:1] == [ChunkVocabulary.bos] else [ChunkVocabulary.bos, *ids]


class _Oracle:
    def __init__(self, template: jinja2.Template) -> None:
        self._template = template
        self._tokenize = ChunkVocabulary().tokenize

    def ids(self, messages: Sequence[Message], continued: bool) -> list[int]:
        exact = self._exactly(messages, continued)
        if exact is not None:
            return exact
        if continued:
            raise RefusalError("the last reply cannot be continued, since the template changes it")
        segments = self._segments(messages)
        if segments is not None:
            return self._join(segments)
        if any(token in message.content for message in messages for token in SPECIAL):
            raise RefusalError(
                "a message contains the text of a special token, and the template changes messages"
            )
        return self._text(self._render(messages), special=True)

    def _exactly(self, messages: Sequence[Message], continued: bool) -> list[int] | None:
        ids: list[int] = []
        previous: int | None = None
        for index, message in enumerate(messages):
            if message.token_ids and message.role == "assistant":
                before = self._between(messages[:index], previous)
                if before is None:
                    return None
                ids += [*before, *message.token_ids]
                previous = index
        if continued and previous == len(messages) - 1:
            return ids
        rest = self._between(messages[:-1] if continued else messages, previous)
        if rest is None:
            return None
        return ids + rest + (self._text(messages[-1].content, special=False) if continued else [])

    def _between(self, messages: Sequence[Message], reply: int | None) -> list[int] | None:
        segments = self._segments(messages)
        if segments is None:
            return None
        if reply is not None:
            ends = [position for position, (_, number) in enumerate(segments) if number == reply]
            if not ends:
                return None
            segments = segments[ends[-1] + 1 :]
        return self._join(segments)

    def _join(self, segments: Sequence[tuple[str, int | None]]) -> list[int]:
        """Text between the template's special tokens is one text, whoever wrote it."""
        ids: list[int] = []
        plain = ""
        for text, number in segments:
            pieces = [text] if number is not None else re.split(f"({_SPECIAL.pattern})", text)
            for piece in pieces:
                if number is None and piece in SPECIAL:
                    ids += [*self._text(plain, special=False), 1 + SPECIAL.index(piece)]
                    plain = ""
                else:
                    plain += piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [*ids, *self._text(plain, special=False)]

    def _text(self, text: str, *, special: bool) -> list[int]:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._tokenize(whole.encode(), special=special) if text else []

    def _render(self, messages: Sequence[Message]) -> str:
        values: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        return self._template.render(messages=values, add_generation_prompt=True)

    def _segments(self, messages: Sequence[Message]) -> list[tuple[str, int | None]] | None:
        cores = [message.content.strip() for message in messages]
        masked = [
            replace(
                message,
                content=message.content.replace(core, f"{_KEY}.{index}.", 1) if core else message.content,
            )
            for index, (message, core) in enumerate(zip(messages, cores, strict=True))
        ]
        pieces = re.split(rf"{_KEY}\.(\d+)\.", self._render(masked))
        texts = [cores[int(piece)] if at % 2 else piece for at, piece in enumerate(pieces)]
        numbers = [int(piece) if at % 2 else None for at, piece in enumerate(pieces)]
        if "".join(texts) != self._render(messages):
            return None
        for at in range(1, len(texts), 2):
            content = messages[numbers[at] or 0].content
            lead = content[: len(content) - len(content.lstrip())]
            trail = content[len(content.rstrip()) :]
            if lead and texts[at - 1].endswith(lead):
                texts[at - 1], texts[at] = texts[at - 1][: -len(lead)], lead + texts[at]
            if trail and texts[at + 1].startswith(trail):
                texts[at + 1], texts[at] = texts[at + 1][len(trail) :], texts[at] + trail
        return [pair for pair in zip(texts, numbers, strict=True) if pair[0]]
