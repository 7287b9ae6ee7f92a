"""Prompts to exact token ids: raw text, conversations through a template, replies by the ids they had.

User text never becomes a special token; template text does. Holds the thread whose stack long words need.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from dsmoe_local.base.text import safe_line, whole_characters
from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.prompts.template import ChatTemplate, Segment
from dsmoe_local.engine.types import Message, Prompt

STACK_BYTES = 256 << 20
MAX_RUN = 200_000
MAX_TOKEN_BYTES = 128  # more than the longest token of the vocabularies in use
# Looks only where a run begins: from each of its letters the search would be quadratic.
_ENDLESS = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1}}}|(?<!\s)\s{{{MAX_RUN + 1}}}")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


class Vocabulary(Protocol):
    """What encoding needs of a model; `native.Model` has it."""

    bos: int
    adds_bos: bool
    n_vocab: int

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Token ids of UTF-8 text, without BOS."""
        ...

    def special_texts(self) -> frozenset[str]:
        """The texts that become special tokens."""
        ...


class PromptEncoder:
    """Encodes prompts for one model and template. Callable from any thread."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate | None, n_context: int) -> None:
        self.template = template
        self._vocabulary = vocabulary
        self._n_context = n_context
        # llama.cpp's pre-tokenizers recurse once per letter of a word: they get a thread with a large stack.
        self._large_stack = ThreadPoolExecutor(1, "dsmoe-tokenize")
        previous = threading.stack_size(STACK_BYTES)
        try:
            self._large_stack.submit(int).result()
        finally:
            threading.stack_size(previous)

    def close(self) -> None:
        """End the thread."""
        self._large_stack.shutdown()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of `prompt`, BOS included where the model wants it. Raises PromptError, TemplateError."""
        if isinstance(prompt, str):
            ids = self._with_bos(self._tokenize(prompt, special=False))
        elif prompt and isinstance(prompt[0], Message):
            messages = [message for message in prompt if isinstance(message, Message)]
            ids = self._with_bos(self._encode_messages(messages))
        else:
            ids = [token_id for token_id in prompt if isinstance(token_id, int)]
            self.check_ids(ids)
        if not ids:
            raise PromptError("the prompt is empty")
        return tuple(ids)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """PromptError if one of them is none."""
        if any(not 0 <= token_id < self._vocabulary.n_vocab for token_id in token_ids):
            raise PromptError(
                "a token id is not in the vocabulary", where=f"0 to {self._vocabulary.n_vocab - 1}"
            )

    def _encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, up to where the reply begins or, after an assistant's message, goes on."""
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"{safe_line(message.role, 40)!r} is no role", remedy="use system, user or assistant"
                )
        if self.template is None:
            raise PromptError(
                "the model has no chat template: it only completes text",
                remedy="send a prompt instead of messages, or name a template with --chat-template",
            )
        exact = self._encode_exactly(messages)
        return self._encode_plainly(messages) if exact is None else exact

    def _encode_exactly(self, messages: Sequence[Message]) -> list[int] | None:
        """With each reply's own ids behind what was read before it; None where the template does not allow
        that.

        The text before a reply is rendered as it was then: a template may end the prompt in `Assistant:` and
        repeat the same turn later as `Assistant: `.
        """
        ids: list[int] = []
        previous: int | None = None
        for index, message in enumerate(messages):
            if message.token_ids and message.role == "assistant":
                before = self._between(messages[:index], previous)
                if before is None:
                    return None
                ids += [*before, *message.token_ids]
                previous = index
        if previous == len(messages) - 1:
            return ids
        continued = messages[-1] if messages[-1].role == "assistant" else None
        rest = self._between(messages[:-1] if continued else messages, previous)
        if rest is None:
            return None
        return ids + rest + (self._tokenize(continued.content, special=False) if continued else [])

    def _between(self, messages: Sequence[Message], reply: int | None) -> list[int] | None:
        """Ids from the end of the reply with that index (None: from the start) to the end of `messages`."""
        assert self.template is not None
        segments = self.template.segments(messages)
        if segments is None:
            return None
        if reply is not None:
            ends = [position for position, segment in enumerate(segments) if segment.message == reply]
            if not ends:
                return None
            segments = segments[ends[-1] + 1 :]
        return self._encode_segments(segments)

    def _encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            ids += self._tokenize(segment.text, special=segment.message is None)
        return ids

    def _encode_plainly(self, messages: Sequence[Message]) -> list[int]:
        """The rendered text as it is, once no content can be mistaken for special tokens."""
        assert self.template is not None
        if messages[-1].role == "assistant":
            raise PromptError("the template changes the last reply, which therefore cannot be continued")
        segments = self.template.segments(messages)
        if segments is not None:
            return self._encode_segments(segments)
        special = self._vocabulary.special_texts()
        if any(text in message.content for message in messages for text in special):
            raise PromptError(
                "a message holds the text of a special token, and the template changes messages",
                remedy="leave that text out, or name another template with --chat-template",
            )
        return self._tokenize(self.template.render(messages), special=True)

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocabulary.bos
        return [bos, *ids] if self._vocabulary.adds_bos and bos >= 0 and ids[:1] != [bos] else ids

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        encoded = whole_characters(text).encode()
        if len(encoded) > self._n_context * MAX_TOKEN_BYTES:
            raise PromptError(
                f"the text is too long for a context of {self._n_context} tokens",
                where=f"{len(encoded)} bytes",
            )
        endless = _ENDLESS.search(text)
        if endless is not None:
            raise PromptError(
                f"a word of more than {MAX_RUN} characters cannot be tokenized",
                where=f"it begins with {safe_line(endless[0][:20])!r}",
                remedy="break it with spaces",
            )
        return self._large_stack.submit(self._vocabulary.tokenize, encoded, special=special).result()
